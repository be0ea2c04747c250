// What went wrong, in plain words.

/** A failed request: a title, a sentence of what to do, and whether and when the same may work again. */
export class Fault extends Error {
  constructor(title, text, { retry = true, afterS = null, needsKey = false } = {}) {
    super(`${title} ${text}`);
    Object.assign(this, { title, text, retry, afterS, needsKey });
  }
}

export function serverGone() {
  return new Fault(
    "The server does not answer.",
    `See whether dymoe-run still runs, and whether this machine reaches ${location.host}.`,
  );
}

export function cutOff() {
  return new Fault("The answer was cut off.", "The connection to the server ended before the answer did.");
}

/** Return the fault of a response that is none of success. */
export async function faultOf(response) {
  const message = await messageOf(response);
  const afterS = Number(response.headers.get("retry-after")) || null;
  switch (response.status) {
    case 401:
      return new Fault("The server asks for an API key.", "Give one from the file of --api-key-file.", { needsKey: true });
    case 403:
      return new Fault("The server refuses this page.", sentence(message), { retry: false });
    case 413:
      return new Fault("The conversation is too long to send.", "Begin a new one, or shorten the message.", { retry: false });
    case 429:
      return new Fault("The server is busy.", "Other requests are before this one.", { afterS: afterS ?? 5 });
    case 503:
      return new Fault("The server is ending, or has too many connections.", "Try again once it is back.", { afterS: null });
    case 400:
      return faultOfRequest(message);
    default:
      return new Fault("There is no answer.", sentence(message));
  }
}

/** Return the fault that an error within a stream tells. */
export function faultInStream(error) {
  if (error?.code === "closing") return new Fault("The server is ending.", "Try again once it is back.");
  return new Fault("The answer failed.", sentence(error?.message ?? ""));
}

function faultOfRequest(message) {
  const [, tokens, context] = message.match(/prompt has (?:more than )?([\d,]+) tokens, but the context holds ([\d,]+)/) ?? [];
  if (!context) return new Fault("The server cannot answer this.", sentence(message), { retry: false });
  return new Fault(
    "The context is full.",
    `The conversation has ${number(tokens)} tokens, and the model holds ${number(context)}. Begin a new conversation, ` +
      "shorten a message, or start the server with a larger --context.",
    { retry: false },
  );
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `It answered with status ${response.status}.`;
  }
}

function number(text) {
  return Number(text.replaceAll(",", "")).toLocaleString("en");
}

function sentence(message) {
  const text = message.trim();
  return text && text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
