// The messages of the shown conversation.

import { entersText, grow } from "./composer.js";
import { nodeOf, path, versions } from "./conversation.js";
import { byId, copy, icon, iconButton, make } from "./dom.js";
import { Rendered } from "./markdown.js";

const NEAR_END_PX = 80, MOST_EDITED_PX = 400;
// Shorter times are not worth telling.
const LEAST_S = 0.1;

export class Transcript {
  /** `on` has the functions edit(node, text), again(node), resume(node), show(node) and dismiss(). */
  constructor(on) {
    this.on = on;
    this.views = new Map(); // by id of the message
    this.scroller = byId("scroll");
    this.follows = true; // whether the end stays in sight while an answer grows
    this.scroller.addEventListener("scroll", () => this.look(), { passive: true });
    new ResizeObserver(() => this.follow()).observe(byId("transcript"));
    byId("to-end").append(icon("down"));
    byId("to-end").addEventListener("click", () => this.toEnd());
  }

  /**
   * Draw the shown messages anew; `running` is the answer of them that is being written, `fault` what went wrong last.
   * While the server is `busy` for this page, messages can only be copied.
   */
  draw(conversation, running, fault, busy) {
    const messages = path(conversation), drawn = new Map();
    const last = messages.at(-1);
    for (const node of messages) {
      const view = this.views.get(node.id) ?? new MessageView(node, this.on);
      view.draw(node, { others: versions(conversation, node), running: node === running, isLast: node === last, busy });
      drawn.set(node.id, view);
    }
    this.views = drawn;
    const elements = [...drawn.values()].map((view) => view.element);
    if (!running && fault) elements.push(faultBox(fault, () => this.on.retry(), () => this.on.dismiss()));
    else if (!busy && last?.role === "user") elements.push(this.unanswered(last));
    const place = byId("transcript");
    for (const element of [...place.children]) if (!elements.includes(element)) element.remove();
    elements.forEach((element, i) => place.children[i] !== element && place.insertBefore(element, place.children[i] ?? null));
  }

  /** Draw what has been added to an answer. */
  grow(node) {
    this.views.get(node.id)?.drawText(true);
  }

  /** Begin to edit a message of the user. */
  edit(conversation, id) {
    if (nodeOf(conversation, id)) this.views.get(id)?.edit();
  }

  toEnd() {
    this.follows = true;
    this.follow();
  }

  follow() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.look();
  }

  look() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.follows = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    byId("to-end").hidden = this.follows;
  }

  unanswered(node) {
    const button = make("button", { type: "button", onclick: () => this.on.again(node) }, "Answer this");
    return make("p", { className: "unanswered" }, "There is no answer yet.", button);
  }
}

class MessageView {
  constructor(node, on) {
    this.node = node;
    this.on = on;
    this.isAnswer = node.role === "assistant";
    this.text = make("div", { className: this.isAnswer ? "text markdown" : "text" });
    this.actions = make("div", { className: "actions" });
    this.element = make(
      "article",
      { className: `message ${this.isAnswer ? "answer" : "question"}`, "aria-label": this.isAnswer ? "Answer" : "You" },
      this.text,
      this.actions,
    );
    this.rendered = this.isAnswer ? new Rendered(this.text) : null;
  }

  draw(node, { others, running, isLast, busy }) {
    this.node = node;
    this.element.classList.toggle("last", isLast);
    this.element.setAttribute("aria-busy", running);
    this.drawText(running);
    this.actions.replaceChildren(...(running ? [] : this.buttons(others, isLast, busy)));
  }

  drawText(running) {
    const { text, reasoning } = this.node;
    if (!this.isAnswer) {
      this.text.textContent = text;
      return;
    }
    this.rendered.show(text);
    this.text.classList.toggle("writing", running && Boolean(text));
    if (reasoning) this.drawReasoning(reasoning, running && !text);
    this.waiting ??= make("p", { className: "waiting" }, "Reading the prompt", make("span", { className: "dots" }));
    if (running && !text && !reasoning) this.element.prepend(this.waiting);
    else this.waiting.remove();
  }

  drawReasoning(reasoning, thinking) {
    if (!this.thoughts) {
      const text = make("div", { className: "markdown" });
      const summary = make("summary");
      this.thoughts = { summary, rendered: new Rendered(text), box: make("details", { className: "reasoning" }, summary, text) };
      this.element.prepend(this.thoughts.box);
    }
    const { summary, rendered, box } = this.thoughts;
    rendered.show(reasoning);
    const seconds = this.node.thought_s;
    summary.textContent = thinking ? "Thinking…" : `Thought${seconds >= LEAST_S ? ` for ${duration(seconds)}` : ""}`;
    box.classList.toggle("thinking", thinking);
  }

  buttons(versions, isLast, busy) {
    const { node, on, isAnswer } = this, made = [];
    if (versions.length > 1 && !busy) made.push(this.versionSwitch(versions));
    const copied = iconButton("copy", isAnswer ? "Copy the answer" : "Copy the message", () => copy(node.text, copied));
    made.push(copied);
    if (isAnswer) {
      if (!busy) made.push(iconButton("redo", "Answer again", () => on.again(node)));
      if (isLast && !busy && node.finish !== "stop" && node.text) {
        const onclick = () => on.resume(node);
        made.push(make("button", { type: "button", className: "quiet", onclick }, icon("more"), "Continue"));
      }
      if (ENDS[node.finish]) made.push(make("span", { className: "end" }, ENDS[node.finish]));
      if (node.usage) made.push(make("span", { className: "usage" }, usageText(node.usage)));
    } else if (!busy) {
      made.push(iconButton("pencil", "Edit the message", () => this.edit()));
    }
    return made;
  }

  versionSwitch(versions) {
    const at = versions.indexOf(this.node), { on } = this;
    const before = iconButton("left", "Earlier version", () => on.show(versions[at - 1]));
    const after = iconButton("right", "Later version", () => on.show(versions[at + 1]));
    before.disabled = at === 0;
    after.disabled = at === versions.length - 1;
    return make("span", { className: "versions" }, before, make("span", {}, `${at + 1}/${versions.length}`), after);
  }

  edit() {
    const field = make("textarea", { value: this.node.text, "aria-label": "Edited message" });
    const finish = (changed) => {
      editor.replaceWith(this.text);
      this.element.classList.remove("edited");
      this.actions.hidden = false;
      if (changed && field.value.trim()) this.on.edit(this.node, field.value.trim());
      else this.actions.querySelector("button:last-of-type")?.focus();
    };
    const onkeydown = (event) => {
      if (event.key === "Escape") finish(false);
      else if (entersText(event)) finish(true);
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    field.addEventListener("keydown", onkeydown);
    field.addEventListener("input", () => grow(field, MOST_EDITED_PX));
    const editor = make(
      "div",
      { className: "editor" },
      field,
      make(
        "div",
        { className: "choices" },
        make("button", { type: "button", onclick: () => finish(false) }, "Cancel"),
        make("button", { type: "button", className: "primary", onclick: () => finish(true) }, "Send"),
      ),
    );
    this.text.replaceWith(editor);
    this.element.classList.add("edited");
    this.actions.hidden = true;
    grow(field, MOST_EDITED_PX);
    field.focus();
  }
}

const ENDS = {
  length: "Ended at the limit of tokens.",
  context: "The context is full.",
  stopped: "Stopped.",
  error: "Cut off.",
};

/** Return what an answer took, as a short text. */
export function usageText({ tokens, seconds, first_s, prompt, reused }) {
  const parts = [`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`];
  if (tokens > 1 && seconds >= LEAST_S) parts.push(`${rate((tokens - 1) / seconds)} tokens/s`);
  if (first_s >= LEAST_S) parts.push(`first after ${duration(first_s)}`);
  if (prompt) parts.push(`prompt of ${prompt.toLocaleString("en")}${reused ? `, ${reused.toLocaleString("en")} reused` : ""}`);
  return parts.join(" · ");
}

export function rate(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return seconds < 60 ? `${seconds.toFixed(0)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** Return a box that says what went wrong; it counts down where the server has said when to come back. */
function faultBox(fault, retry, dismiss) {
  const again = make("button", { type: "button", className: "primary", onclick: retry }, "Try again");
  const choices = make("div", { className: "choices" }, make("button", { type: "button", onclick: dismiss }, "Dismiss"));
  if (fault.retry) choices.append(again);
  const box = make(
    "div",
    { className: "fault", role: "group", "aria-label": "Problem" },
    make("strong", {}, fault.title),
    make("p", {}, fault.text),
    choices,
  );
  if (fault.afterS) countDown(fault.afterS, box, again, retry);
  return box;
}

function countDown(seconds, box, button, retry) {
  const end = performance.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    button.textContent = left > 0 ? `Try again (${left} s)` : "Try again";
    if (left <= 0 || !box.isConnected) clearInterval(timer);
    if (left <= 0 && box.isConnected) retry();
  };
  const timer = setInterval(tick, 250);
  button.textContent = `Try again (${Math.ceil(seconds)} s)`;
}
