// Markdown as elements, without a way for script in.
//
// A model may write anything, and what it writes may come from a document that somebody else wrote. Four things stand
// between that and this page: HTML in Markdown is shown as the text that it is; DOMPurify keeps a short list of tags and
// no scheme of links but these three; images become links, because loading one tells its server something; and the
// policy of the page (Content-Security-Policy) runs no script and loads nothing that is not a file of this server.

import { Marked } from "../vendor/marked.js";
import DOMPurify from "../vendor/purify.js";
import { copy, icon, make } from "./dom.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre s strong sub sup".split(" "),
    ..."table tbody td th thead tr ul".split(" "),
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || "image")}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/** A text that grows: only blocks that changed are drawn again, so that a selection in the others stays. */
export class Rendered {
  constructor(element) {
    this.element = element;
    this.blocks = []; // [source, elements] of each
    this.links = ""; // what names of links mean; it may come after they are used
  }

  show(text) {
    const tokens = marked.lexer(text);
    const links = JSON.stringify(tokens.links);
    const changed = tokens.findIndex((token, i) => token.raw !== this.blocks[i]?.[0]);
    const first = links !== this.links ? 0 : changed < 0 ? tokens.length : changed;
    this.links = links;
    for (const [, elements] of this.blocks.splice(first)) elements.forEach((element) => element.remove());
    for (const token of tokens.slice(first)) {
      const elements = safe(marked.parser(Object.assign([token], { links: tokens.links })));
      this.element.append(...elements);
      this.blocks.push([token.raw, elements]);
    }
  }
}

/** Return the elements of an HTML text, with nothing in them but what is allowed. */
function safe(html) {
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  for (const code of fragment.querySelectorAll("pre > code")) dressCode(code);
  for (const element of fragment.querySelectorAll("[class]:not(.code, .code *)")) element.removeAttribute("class");
  for (const table of fragment.querySelectorAll("table")) {
    const around = make("div", { className: "wide-table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(around);
    around.append(table);
  }
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) continue;
    Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow", title: link.href });
  }
  return [...fragment.childNodes];
}

/** Put a bar with the language and a button to copy over a block of code. */
function dressCode(code) {
  const language = code.className.match(/^language-([\w+#.-]{1,30})$/)?.[1] ?? "";
  code.removeAttribute("class");
  const button = make("button", { type: "button", className: "quiet" }, icon("copy"), "Copy");
  button.addEventListener("click", () => copy(code.textContent.replace(/\n$/, ""), button));
  const block = make("div", { className: "code" });
  code.parentElement.replaceWith(block);
  const bar = make("div", { className: "code-bar" }, make("span", {}, language || "code"), button);
  block.append(bar, make("pre", { tabIndex: 0, "aria-label": `Code, ${language || "no language"}` }, code));
}
