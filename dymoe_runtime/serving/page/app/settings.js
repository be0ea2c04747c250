// What the reader has set, kept in localStorage. What is empty is as the server was started.

const NAME = "settings", KEY = "api-key";
const DEFAULTS = {
  system: "",
  temperature: "",
  top_p: "",
  max_tokens: "",
  seed: "",
  thinking: "",
  effort: "",
  theme: "",
  live: null, // whether the live figures are shown; null is as the width of the window says
};

export const settings = { ...DEFAULTS, ...stored() };

/** Change settings and keep them; return false if the browser has no room for them. */
export function change(values) {
  Object.assign(settings, values);
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
  return keep("localStorage", NAME, JSON.stringify(settings));
}

export function reset() {
  return change({ ...DEFAULTS, live: settings.live });
}

/** Return the API key, or "". */
export function apiKey() {
  return read("sessionStorage", KEY) || read("localStorage", KEY) || "";
}

/** Take an API key for this tab or, with `forever`, for this browser; "" forgets it. */
export function setApiKey(key, forever) {
  for (const place of ["sessionStorage", "localStorage"]) drop(place, KEY);
  if (key) keep(forever ? "localStorage" : "sessionStorage", KEY, key);
}

export function keyIsKept() {
  return Boolean(read("localStorage", KEY));
}

/** Return the fields of a request that the settings ask for; `variables` are those of the chat template. */
export function requestFields(variables) {
  const fields = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (settings[name] !== "" && Number.isFinite(Number(settings[name]))) fields[name] = Number(settings[name]);
  }
  const switches = thinkingSwitches(variables);
  if (settings.thinking && switches.length) {
    fields.chat_template_kwargs = Object.fromEntries(switches.map((name) => [name, settings.thinking === "on"]));
  }
  if (settings.effort && variables.includes("reasoning_effort")) fields.reasoning_effort = settings.effort;
  return fields;
}

/** Return the variables by which a chat template switches thinking on or off. */
export function thinkingSwitches(variables) {
  return ["enable_thinking", "thinking"].filter((name) => variables.includes(name));
}

function stored() {
  try {
    const values = JSON.parse(read("localStorage", NAME) || "{}");
    return Object.fromEntries(
      Object.keys(DEFAULTS).filter((name) => name in values).map((name) => [name, values[name]]),
    );
  } catch {
    return {};
  }
}

// Where a browser blocks storage, even naming it fails.
function read(place, name) {
  try {
    return globalThis[place].getItem(name);
  } catch {
    return null;
  }
}

function keep(place, name, value) {
  try {
    globalThis[place].setItem(name, value);
    return true;
  } catch {
    return false;
  }
}

function drop(place, name) {
  try {
    globalThis[place].removeItem(name);
  } catch {
    // A browser that keeps nothing has nothing to forget.
  }
}
