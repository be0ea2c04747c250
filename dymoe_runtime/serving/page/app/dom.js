// Making elements, and telling screen readers what happened.

const SVG = "http://www.w3.org/2000/svg";

// Paths on a field of 24 by 24, drawn as strokes.
const ICONS = {
  menu: "M4 6h16M4 12h16M4 18h16",
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  gear: "M4 7h10M18 7h2M4 17h2M10 17h10M16 5v4M8 15v4",
  pulse: "M3 12h4l3-8 4 16 3-8h4",
  send: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12l5 5 9-10",
  pencil: "M4 20l1-4L16 5l3 3L8 19zM13 8l3 3",
  redo: "M19 12a7 7 0 1 1-2-5M19 3v5h-5",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v6M14 11v6",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  more: "M5 5v14M9 5l8 7-8 7z",
};

/** Return an element with properties, attributes (`aria-…`, `role`) and children (elements or texts). */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return an icon; it says nothing to screen readers. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  drawing.append(path);
  return drawing;
}

/** Return a small button of an icon alone, which has `label` as its name and its tooltip. */
export function iconButton(name, label, onclick) {
  return make("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick }, icon(name));
}

export function byId(id) {
  return document.getElementById(id);
}

/** Let a screen reader say a sentence; a later one replaces it. */
export function announce(sentence) {
  byId("announcer").textContent = sentence;
}

/** Copy a text; the button shows for a moment that it worked. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    if (!copyBySelection(text)) return announce("The browser does not allow copying.");
  }
  const before = [...button.childNodes];
  button.replaceChildren(icon("check"));
  announce("Copied.");
  setTimeout(() => button.replaceChildren(...before), 1500);
}

/** Copy a text where there is no clipboard: pages by plain HTTP from another machine have none. */
function copyBySelection(text) {
  const field = make("textarea", { className: "unseen", value: text });
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return done;
}
