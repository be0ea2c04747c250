// Requests to the server that this page came from, and to nobody else.

import { cutOff, faultInStream, faultOf, serverGone } from "./faults.js";
import { apiKey } from "./settings.js";

/** Return what the server runs and its statistics (see /props); throw a Fault. */
export async function props() {
  return (await request("props")).json();
}

/** Yield {text, reasoning, finish, usage} of an answer as it comes; throw a Fault, or AbortError once `signal` is. */
export async function* answer(path, body, signal) {
  const response = await request(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw faultInStream(chunk.error);
    const choice = chunk.choices?.[0];
    finished ||= Boolean(choice?.finish_reason);
    yield {
      text: choice?.delta?.content ?? choice?.text ?? "",
      reasoning: choice?.delta?.reasoning_content ?? "",
      finish: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  }
  if (!finished) throw cutOff();
}

async function request(path, body, signal) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const options = { headers, signal, cache: "no-store", credentials: "omit", redirect: "error" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : serverGone();
  }
  if (!response.ok) throw await faultOf(response);
  return response;
}

/** Yield the data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      const lines = (held + value).split(/\r?\n/);
      held = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trimStart();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : cutOff();
  }
}
