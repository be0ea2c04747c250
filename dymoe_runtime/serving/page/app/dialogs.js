// Dialogs: a question, the API key, the settings. The browser keeps the focus in them and gives it back.

import { iconButton, make } from "./dom.js";
import { apiKey, change, keyIsKept, reset, setApiKey, settings, thinkingSwitches } from "./settings.js";

/** Ask before something that cannot be undone; resolve to whether the reader agreed. */
export function ask(title, text, verb) {
  return new Promise((resolve) => {
    const { dialog, form } = open(title, () => resolve(dialog.returnValue === "yes"));
    form.append(
      make("p", {}, text),
      choices(make("button", { value: "no" }, "Cancel"), make("button", { value: "yes", className: "danger" }, verb)),
    );
    dialog.showModal();
  });
}

/** Ask for the API key; resolve to whether one was given. */
export function askKey() {
  return new Promise((resolve) => {
    const { dialog, form } = open("This server asks for an API key", () => {
      const given = dialog.returnValue === "yes" && fields.key.value.trim();
      if (given) setApiKey(fields.key.value.trim(), fields.forever.checked);
      resolve(Boolean(given));
    });
    const fields = keyFields();
    const wrong = apiKey() ? "The server does not know the key that this page has. " : "";
    form.append(
      make("p", {}, `${wrong}Whoever runs the server has the keys, in the file of --api-key-file.`),
      ...fields.elements,
      choices(
        make("button", { value: "no", formNoValidate: true }, "Cancel"),
        make("button", { value: "yes", className: "primary" }, "Use it"),
      ),
    );
    Object.assign(fields.key, { required: true, value: "" });
    dialog.showModal();
    fields.key.focus();
  });
}

/** Show the settings. `server` is what /props told, or null; `on` has changed() and clear(). */
export function showSettings(server, on) {
  const { dialog, form } = open("Settings", () => {
    if (fields.key.value.trim() !== apiKey() || fields.forever.checked !== keyIsKept()) {
      setApiKey(fields.key.value.trim(), fields.forever.checked);
    }
    on.changed();
  });
  const fields = keyFields();
  dialog.classList.add("settings");
  form.append(
    section(
      "Answers",
      area("System prompt", "system", "How the model should answer, in every conversation"),
      make("div", { className: "pair" }, ...numberFields(server?.default_generation_settings?.params ?? {})),
      ...thinkingFields(server?.chat_template_variables ?? []),
      make("p", { className: "about" }, "What is empty is as the server was started."),
    ),
    section("Look", choice("Theme", "theme", [["", "As the system"], ["light", "Light"], ["dark", "Dark"]])),
    section("Access", ...fields.elements),
    section(
      "Conversations",
      make("p", { className: "about" }, "They are kept in this browser, and sent to this server alone."),
      make("button", { type: "button", className: "danger", onclick: () => clear(on) }, "Delete all conversations"),
    ),
    choices(
      make("button", { type: "button", onclick: () => (reset(), dialog.close(), showSettings(server, on)) }, "Reset"),
      make("button", { value: "yes", className: "primary" }, "Done"),
    ),
  );
  dialog.showModal();
}

async function clear(on) {
  if (await ask("Delete all conversations?", "None of them can be brought back.", "Delete all")) on.clear();
}

let opened = 0;

/** Open a dialog whose focus begins on its title, so that no keyboard covers a phone. */
function open(title, closed) {
  const heading = make("h2", { id: `dialog-${(opened += 1)}`, tabIndex: -1, autofocus: true }, title);
  const form = make("form", { method: "dialog" });
  const dialog = make("dialog", { "aria-labelledby": heading.id });
  const close = iconButton("close", "Close", () => dialog.close());
  dialog.append(make("div", { className: "bar" }, heading, close), form);
  dialog.addEventListener("close", () => {
    dialog.remove();
    // After a field for passwords, Chromium gives the focus back, but what is typed only to a field that takes it anew.
    const focused = document.activeElement;
    focused.blur();
    focused.focus();
    closed();
  });
  document.body.append(dialog);
  return { dialog, form };
}

function choices(...buttons) {
  return make("div", { className: "choices" }, ...buttons);
}

function section(title, ...parts) {
  return make("fieldset", {}, make("legend", {}, title), ...parts);
}

function labelled(label, field) {
  return make("label", {}, make("span", {}, label), field);
}

// A value that its field does not allow is not taken; the browser says why when the dialog is left.
function bound(field, name) {
  field.value = settings[name];
  field.name = name;
  field.addEventListener("change", () => field.validity.valid && change({ [name]: field.value.trim() }));
  return field;
}

function area(label, name, placeholder) {
  return labelled(label, bound(make("textarea", { rows: 3, placeholder }), name));
}

function choice(label, name, options) {
  const made = options.map(([value, text]) => make("option", { value }, text));
  return labelled(label, bound(make("select", {}, ...made), name));
}

function numberFields(defaults) {
  const fields = [
    ["Temperature", "temperature", { min: 0, max: 1000, step: "any" }, defaults.temperature],
    ["Top-p", "top_p", { min: 0, max: 1, step: "any" }, defaults.top_p],
    ["Most tokens of an answer", "max_tokens", { min: 1, step: 1 }, "as many as fit"],
    ["Seed", "seed", { step: 1 }, "another one each time"],
  ];
  return fields.map(([label, name, limits, placeholder]) =>
    labelled(label, bound(make("input", { type: "number", placeholder: placeholder ?? "", ...limits }), name)),
  );
}

function thinkingFields(variables) {
  const fields = [];
  const asServer = ["", "As the model does"];
  if (thinkingSwitches(variables).length) {
    fields.push(choice("Thinking", "thinking", [asServer, ["on", "On"], ["off", "Off"]]));
  }
  if (variables.includes("reasoning_effort")) {
    const efforts = [["low", "Low"], ["medium", "Medium"], ["high", "High"]];
    fields.push(choice("Effort of thinking", "effort", [asServer, ...efforts]));
  }
  return fields;
}

function keyFields() {
  const key = make("input", { type: "password", autocomplete: "off", value: apiKey(), spellcheck: false });
  const forever = make("input", { type: "checkbox", checked: keyIsKept() });
  const keep = make("label", { className: "check" }, forever, make("span", {}, "Keep it in this browser"));
  return { key, forever, elements: [labelled("API key", key), keep] };
}
