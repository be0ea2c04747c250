// The page: it joins the conversation, its storage, the server and the parts that are seen.

import { Composer } from "./composer.js";
import { add, isConversation, newConversation, nodeOf, path, remove, show } from "./conversation.js";
import { askKey, showSettings } from "./dialogs.js";
import { announce, byId, icon, make } from "./dom.js";
import { Drawers } from "./drawers.js";
import { Fault } from "./faults.js";
import { Live } from "./live.js";
import { answer, props } from "./server.js";
import { requestFields, settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Storage } from "./storage.js";
import { Transcript } from "./transcript.js";

const DRAW_MS = 60, SAVE_MS = 2000;

const state = {
  server: null, // what /props told
  conversations: new Map(), // by id
  shown: newConversation(),
  running: null, // {conversation, node, abort} of the answer that is being written
  fault: null, // what went wrong in the shown conversation
};

const storage = new Storage((reason) => notify(NO_STORAGE[reason]));
const NO_STORAGE = {
  full: "The browser has no room to keep this conversation. Delete others, or it is lost when this page is closed.",
  none: "The browser keeps nothing for this page: conversations are lost when it is closed.",
};
const transcript = new Transcript({
  edit: (node, text) => ask(text, node.parent),
  again: (node) => respond(node.role === "user" ? node : nodeOf(state.shown, node.parent)),
  resume: (node) => respond(null, node),
  show(node) {
    show(state.shown, node);
    state.fault = null;
    keep(state.shown);
    draw();
  },
  retry: () => respond(nodeOf(state.shown, state.shown.leaf)),
  dismiss() {
    state.fault = null;
    draw();
    composer.focus();
  },
});
const composer = new Composer({
  send: (text) => ask(text, state.shown.leaf),
  stop,
  editLast() {
    const last = path(state.shown).findLast((node) => node.role === "user");
    if (last && !state.running) transcript.edit(state.shown, last.id);
  },
});
const sidebar = new Sidebar({
  open,
  rename(id, title) {
    const conversation = state.conversations.get(id);
    if (conversation.title !== title) keep(Object.assign(conversation, { title }));
    draw();
  },
  remove(id) {
    if (state.running?.conversation.id === id) stop();
    state.conversations.delete(id);
    storage.delete(id);
    if (state.shown.id === id) begin();
    else draw();
  },
});
const live = new Live(told);
const drawers = new Drawers(live);

async function start() {
  for (const [id, name] of [["open-sidebar", "menu"], ["close-sidebar", "close"], ["open-live", "pulse"], ["open-settings", "gear"]]) {
    byId(id).append(icon(name));
    byId(id).title = byId(id).getAttribute("aria-label");
  }
  byId("new").prepend(icon("plus"));
  byId("new").addEventListener("click", () => begin());
  byId("open-settings").addEventListener("click", () =>
    showSettings(state.server, { changed: () => reach(), clear: clearAll }),
  );
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.running && !document.querySelector("dialog[open]")) stop();
  });
  storage.whenChangedElsewhere(load);
  await load();
  draw();
  composer.focus();
  reach();
}

/** Learn what the server runs; ask for the key if it needs one. */
async function reach() {
  try {
    told(await props());
    if (state.fault && !nodeOf(state.shown, state.shown.leaf)) state.fault = null;
    draw();
  } catch (error) {
    if (error.needsKey && (await askKey())) return reach();
    state.fault ??= error;
    draw();
  }
}

function told(server) {
  const first = !state.server;
  state.server = server;
  if (first) draw();
}

/** Read the conversations from storage again; `changed` is the id of one that another tab has changed. */
async function load(changed) {
  const before = state.running?.conversation;
  const found = (await storage.all()).filter(isConversation);
  state.conversations = new Map(found.map((conversation) => [conversation.id, conversation]));
  if (before) state.conversations.set(before.id, before);
  if (changed === state.shown.id && state.conversations.has(changed)) state.shown = state.conversations.get(changed);
  if (changed !== undefined) draw();
}

function begin() {
  state.shown = newConversation();
  state.fault = null;
  drawers.close();
  draw();
  composer.focus();
}

function open(id) {
  state.shown = state.conversations.get(id);
  state.fault = null;
  drawers.close();
  draw();
  transcript.toEnd();
  composer.focus();
}

function clearAll() {
  stop();
  state.conversations.clear();
  storage.clear();
  begin();
}

/** Add a message of the user after another one, and answer it; return whether that is possible now. */
function ask(text, parent) {
  if (state.running) return false;
  respond(add(state.shown, parent, "user", text));
  return true;
}

/** Answer a message of the user, or write on at the end of an answer. */
async function respond(question, begun = null) {
  if (state.running) return;
  const conversation = state.shown;
  if (question === null && begun === null) return reach().then(() => state.server && draw());
  if (question?.role === "assistant") return respond(nodeOf(conversation, question.parent));
  const node = begun ?? add(conversation, question.id, "assistant", "");
  const job = { conversation, node, abort: new AbortController() };
  Object.assign(state, { running: job, fault: null });
  keep(conversation);
  draw();
  transcript.toEnd();
  announce("The model answers.");
  const fault = await write(job, request(conversation, node));
  state.running = null;
  if (node.finish !== "stop" && !node.text && !node.reasoning) remove(conversation, node);
  if (state.conversations.has(conversation.id)) keep(conversation);
  if (fault?.needsKey && (await askKey())) return respond(nodeOf(conversation, node.parent));
  if (conversation === state.shown) state.fault = fault;
  draw();
  announce(fault ? `${fault.title} ${fault.text}` : ending(node));
}

/** Write an answer as it comes; return the fault that ended it, if one did. */
async function write(job, { path, body }) {
  const { node, conversation } = job;
  const clock = { begun: performance.now(), first: null, thought: null, tokens: 0, drawn: 0, saved: performance.now() };
  const usage = { tokens: 0, seconds: 0, first_s: 0, prompt: 0, reused: 0 };
  node.finish = "error";
  try {
    for await (const piece of answer(path, body, job.abort.signal)) {
      const now = performance.now();
      node.text += piece.text;
      if (piece.reasoning) node.reasoning = (node.reasoning ?? "") + piece.reasoning;
      if (piece.text || piece.reasoning) {
        clock.first ??= now;
        clock.tokens += 1;
      }
      if (node.reasoning && piece.text && !clock.thought) node.thought_s = ((clock.thought = now) - clock.begun) / 1000;
      if (piece.finish) node.finish = piece.finish;
      if (piece.usage) note(usage, piece.usage);
      if (now - clock.drawn > DRAW_MS) drawSoon(clock, job);
      if (now - clock.saved > SAVE_MS && state.conversations.has(conversation.id)) {
        clock.saved = now;
        keep(conversation);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") return error instanceof Fault ? error : unknown(error);
    node.finish = "stopped";
  } finally {
    usage.tokens ||= clock.tokens;
    usage.seconds = clock.first === null ? 0 : (performance.now() - clock.first) / 1000;
    usage.first_s = clock.first === null ? 0 : (clock.first - clock.begun) / 1000;
    if (usage.tokens) node.usage = usage;
    const room = state.server?.default_generation_settings?.n_ctx;
    if (node.finish === "length" && usage.prompt + usage.tokens >= room) node.finish = "context";
  }
  return null;
}

function note(usage, told) {
  usage.tokens = told.completion_tokens;
  usage.prompt = told.prompt_tokens;
  usage.reused = told.prompt_tokens_details?.cached_tokens ?? 0;
}

function drawSoon(clock, job) {
  clock.drawn = performance.now();
  requestAnimationFrame(() => {
    if (job.conversation === state.shown && state.running === job) transcript.grow(job.node);
  });
}

/** Return the path and the body of the request for an answer. A model without a chat template continues the text. */
function request(conversation, node) {
  const messages = path(conversation, node.id).filter((message) => message.role === "user" || message.text);
  const fields = requestFields(state.server?.chat_template_variables ?? []);
  if (state.server && !state.server.has_chat_template) {
    return { path: "v1/completions", body: { prompt: messages.map(({ text }) => text).join(""), ...fields } };
  }
  const system = settings.system.trim();
  return {
    path: "v1/chat/completions",
    body: {
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...messages.map(({ role, text, reasoning }) => ({
          role,
          content: text,
          ...(reasoning ? { reasoning_content: reasoning } : {}),
        })),
      ],
      ...fields,
    },
  };
}

function stop() {
  state.running?.abort.abort();
}

function unknown(error) {
  console.error(error);
  return new Fault("The page failed.", `${error.name}: ${error.message}`);
}

function ending(node) {
  if (node.finish === "stopped") return "Stopped.";
  const words = node.text.split(/\s+/).filter(Boolean).length;
  return `The answer is complete: ${words} word${words === 1 ? "" : "s"}.`;
}

function keep(conversation) {
  state.conversations.set(conversation.id, conversation);
  storage.save(conversation);
}

function notify(text) {
  const dismiss = make("button", { type: "button", onclick: () => byId("notice").replaceChildren() }, "Dismiss");
  if (byId("notice").firstChild?.textContent !== text) byId("notice").replaceChildren(make("p", {}, text), dismiss);
}

function draw() {
  const { shown, running, server, fault } = state;
  const here = running?.conversation === shown ? running.node : null;
  sidebar.draw(state.conversations.values(), shown.id, running?.conversation.id);
  transcript.draw(shown, here, fault, Boolean(running));
  composer.running = Boolean(running);
  live.running = Boolean(running);
  byId("title").textContent = shown.title || "New conversation";
  document.title = shown.title ? `${shown.title} – DyMoE` : "DyMoE";
  const name = server?.model_alias ?? "";
  byId("model").textContent = name;
  byId("model").hidden = !name;
  composer.hint = server?.has_chat_template === false ? "A text to go on with" : `Ask ${name || "the model"} something`;
  byId("welcome").hidden = shown.nodes.length > 0 || Boolean(fault);
  if (!byId("welcome").hidden) welcome(server);
}

/** Say what the server runs, where there is no conversation yet. */
function welcome(server) {
  const box = byId("welcome");
  if (!server) return box.replaceChildren();
  const { layers, experts_per_layer: experts, experts_per_token: active } = server.model;
  const facts = [];
  if (layers) facts.push(`${layers} layers`, `${active} of ${experts} experts a token`);
  facts.push(`${server.default_generation_settings.n_ctx.toLocaleString("en")} tokens of context`);
  if (server.precision) facts.push(/^\d/.test(server.precision) ? `point ${server.precision}` : server.precision);
  const plain = "This model has no chat template: it continues your text instead of answering it.";
  box.replaceChildren(
    make("img", { src: "page/icon.svg", alt: "", width: 56, height: 56 }),
    make("h2", {}, server.model_alias),
    make("ul", {}, ...facts.map((fact) => make("li", {}, fact))),
    ...(server.has_chat_template ? [] : [make("p", {}, plain)]),
  );
}

start();
