// A conversation as a tree of messages: an edited question or another answer is a branch beside the first one.
//
// A conversation is {id, title, updated, nodes, leaf}: `nodes` holds the messages in the order in which they were made,
// `leaf` is the id of the last message that is shown. A message is {id, parent, role, text} and, for an answer,
// {reasoning, finish, usage}.

export const TITLE_LENGTH = 60;

export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), nodes: [], leaf: null };
}

// `crypto.randomUUID` is missing on pages that come by plain HTTP from another machine.
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function nodeOf(conversation, id) {
  return conversation.nodes.find((node) => node.id === id) ?? null;
}

/** Return the shown messages, first to last; `leaf` may be another message to end with. */
export function path(conversation, leaf = conversation.leaf) {
  const messages = [];
  for (let node = nodeOf(conversation, leaf); node; node = nodeOf(conversation, node.parent)) messages.unshift(node);
  return messages;
}

/** Add a message after `parent`, show it, and return it. */
export function add(conversation, parent, role, text) {
  const node = { id: newId(), parent, role, text };
  conversation.nodes.push(node);
  conversation.leaf = node.id;
  if (!conversation.title && role === "user") conversation.title = titleOf(text);
  conversation.updated = Date.now();
  return node;
}

/** Take a message away that nothing follows, and show the one before it. */
export function remove(conversation, node) {
  conversation.nodes = conversation.nodes.filter((other) => other !== node);
  if (conversation.leaf === node.id) conversation.leaf = node.parent;
}

/** Return all messages in the place of one: its other versions, and itself. */
export function versions(conversation, node) {
  return conversation.nodes.filter((other) => other.parent === node.parent);
}

/** Show another version of a message, with what followed it last. */
export function show(conversation, node) {
  let last = node;
  for (let next = node; next; next = conversation.nodes.findLast((other) => other.parent === last.id)) last = next;
  conversation.leaf = last.id;
}

export function titleOf(text) {
  const line = text.trim().split("\n")[0].trim();
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}

/** Return whether a value from storage is a conversation that this page can show. */
export function isConversation(value) {
  return (
    typeof value?.id === "string" &&
    typeof value.title === "string" &&
    Number.isFinite(value.updated) &&
    Array.isArray(value.nodes) &&
    value.nodes.every((node) => typeof node?.text === "string" && ["user", "assistant"].includes(node.role))
  );
}
