// The field for messages: it grows with its text, and Enter sends where there is a real keyboard.

import { byId, icon } from "./dom.js";

const MOST_LINES_PX = 240;

export class Composer {
  /** `send(text)` returns whether the text was taken; `stop()` ends the answer; `editLast()` edits the last message. */
  constructor({ send, stop, editLast }) {
    this.field = byId("message");
    this.sends = send;
    byId("send").append(icon("send"));
    byId("stop").append(document.createElement("span"));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", stop);
    this.field.addEventListener("input", () => this.fit());
    this.field.addEventListener("keydown", (event) => {
      if (entersText(event)) {
        event.preventDefault();
        this.send();
      } else if (event.key === "ArrowUp" && !this.field.value) {
        event.preventDefault();
        editLast();
      }
    });
    this.fit();
  }

  send() {
    if (this.busy || !this.field.value.trim() || !this.sends(this.field.value.trim())) return;
    this.field.value = "";
    this.fit();
  }

  /** Show the button to stop in place of the one to send, or back. */
  set running(running) {
    this.busy = running;
    const focused = document.activeElement === byId(running ? "send" : "stop");
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    if (focused && running) byId("stop").focus();
    else if (focused) this.focus();
    this.fit();
  }

  set hint(text) {
    this.field.placeholder = text;
  }

  /** Go to the field, but not on a touch screen, whose keyboard would come up. */
  focus() {
    if (hasKeyboard()) this.field.focus();
  }

  fit() {
    grow(this.field, MOST_LINES_PX);
    byId("send").disabled = !this.field.value.trim();
  }
}

/** Make a field as high as its text, up to `most` pixels. */
export function grow(field, most) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, most)}px`;
}

/** Return whether a key press means "send": Enter, but not while an input method composes, nor on a touch screen. */
export function entersText(event) {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey || event.altKey) return false;
  return event.ctrlKey || event.metaKey || hasKeyboard();
}

function hasKeyboard() {
  return !matchMedia("(pointer: coarse)").matches;
}
