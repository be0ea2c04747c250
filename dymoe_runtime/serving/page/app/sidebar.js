// The list of conversations: open, rename, delete.

import { byId, iconButton, make } from "./dom.js";
import { ask } from "./dialogs.js";

const DAY_MS = 86_400_000;

export class Sidebar {
  /** `on` has the functions open(id), rename(id, title) and remove(id). */
  constructor(on) {
    this.on = on;
    this.drawn = ""; // what the list shows
  }

  /** Draw the list, the latest conversation first. */
  draw(conversations, shownId, runningId) {
    const sorted = [...conversations].sort((a, b) => b.updated - a.updated), groups = new Map();
    const shows = JSON.stringify([sorted.map(({ id, title, updated }) => [id, title, age(updated)]), shownId, runningId]);
    if (shows === this.drawn) return;
    this.drawn = shows;
    const focused = byId("conversations").contains(document.activeElement) ? document.activeElement.title : "";
    for (const conversation of sorted) {
      const name = age(conversation.updated);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(this.entry(conversation, shownId, runningId));
    }
    const parts = [...groups].map(([name, entries]) =>
      make("section", { "aria-label": name }, make("h2", {}, name), make("ul", {}, ...entries)),
    );
    byId("conversations").replaceChildren(...parts);
    if (focused) this.focus(focused);
  }

  focus(title) {
    [...byId("conversations").querySelectorAll("button")].find((button) => button.title === title)?.focus();
  }

  entry(conversation, shownId, runningId) {
    const { id, title } = conversation, { on } = this, shown = id === shownId;
    const open = make("button", { type: "button", className: "open", title, onclick: () => on.open(id) }, title);
    if (shown) open.setAttribute("aria-current", "true");
    const rename = iconButton("pencil", `Rename “${title}”`, () => this.rename(entry, conversation));
    const remove = iconButton("trash", `Delete “${title}”`, async () => {
      const sure = await ask("Delete this conversation?", `“${title}” cannot be brought back.`, "Delete");
      if (sure) on.remove(id);
    });
    const entry = make("li", { className: `${shown ? "shown" : ""} ${id === runningId ? "running" : ""}` }, open, rename, remove);
    return entry;
  }

  rename(entry, conversation) {
    const field = make("input", { type: "text", value: conversation.title, "aria-label": "Title", maxLength: 200 });
    let open = true;
    const finish = (changed) => {
      if (!open) return;
      open = false;
      const title = (changed && field.value.trim()) || conversation.title;
      const leaves = document.activeElement !== field;
      this.on.rename(conversation.id, title);
      if (!leaves) this.focus(title);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) finish(true);
      if (event.key === "Escape") finish(false);
      if (event.key === "Escape") event.stopPropagation();
    });
    field.addEventListener("blur", () => finish(true));
    this.drawn = "";
    entry.replaceChildren(field);
    field.select();
    field.focus();
  }
}

/** Return under which heading a conversation of a time stands. */
function age(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY_MS) return "Yesterday";
  return time >= today - 7 * DAY_MS ? "Last 7 days" : "Earlier";
}
