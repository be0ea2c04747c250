// The list of conversations and the live figures lie over the messages where the window is narrow.

import { byId } from "./dom.js";

const NARROW = matchMedia("(max-width: 860px)"), MEDIUM = matchMedia("(max-width: 1179px)");

export class Drawers {
  constructor(live) {
    this.live = live;
    byId("open-sidebar").addEventListener("click", () => this.openSidebar());
    byId("close-sidebar").addEventListener("click", () => this.close(true));
    byId("open-live").addEventListener("click", () => {
      live.toggle();
      this.settle();
      if (MEDIUM.matches && live.open) byId("live").querySelector("button").focus();
    });
    byId("live").addEventListener("click", () => {
      this.settle();
      if (!live.open) byId("open-live").focus();
    });
    byId("shade").addEventListener("click", () => this.close(true));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || byId("shade").hidden || document.querySelector("dialog[open]")) return;
      event.stopImmediatePropagation();
      this.close(true);
    });
    for (const width of [NARROW, MEDIUM]) width.addEventListener("change", () => this.settle());
    if (MEDIUM.matches && live.open) live.show(false);
    this.settle();
  }

  openSidebar() {
    document.body.classList.add("listing");
    this.settle();
    byId("close-sidebar").focus();
  }

  /** Close what lies over the messages; with `back`, the focus goes to the button that opened it. */
  close(back = false) {
    const opener = byId(document.body.classList.contains("listing") ? "open-sidebar" : "open-live");
    document.body.classList.remove("listing");
    if (MEDIUM.matches && this.live.open) this.live.toggle(false);
    this.settle();
    if (back) opener.focus();
  }

  /** Let only what lies on top be reached. */
  settle() {
    const listing = NARROW.matches && document.body.classList.contains("listing");
    const figures = MEDIUM.matches && this.live.open;
    byId("sidebar").inert = NARROW.matches && !listing;
    byId("open-sidebar").setAttribute("aria-expanded", listing);
    byId("shade").hidden = !listing && !figures;
    document.querySelector("main").inert = listing || figures;
  }
}
