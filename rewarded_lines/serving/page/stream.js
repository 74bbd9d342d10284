// Talks to the server: its preferences, its streamed answers, and its errors as text.

// Milliseconds without a look at what the user does.
const LONGEST_WORK = 30;

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function messageOf(response) {
  const text = await response.text();
  try {
    const content = JSON.parse(text);
    return content.error?.message ?? content.message ?? content.detail ?? text;
  } catch {
    return text;
  }
}

// Sends a request; a path is relative to the page, which may stand behind a proxy. Errors have the server's own text.
export async function request(path, { key = "", body, signal } = {}) {
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (!response.ok) {
    const said = await messageOf(response);
    const known = { 401: "The server wants an API key." }[response.status] ?? `Error ${response.status}.`;
    throw new ServerError(said ? `${known} ${said}` : known, response.status);
  }
  return response;
}

const breath = () => new Promise((go) => setTimeout(go));

// Yields the data of server-sent events, those that came together in one list, however the network cuts them.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [waiting, rested] = ["", performance.now()];
  for (;;) {
    const { value, done } = await reader.read();
    waiting += value ?? "";
    const blocks = waiting.split(/\r?\n\r?\n/);
    waiting = blocks.pop();
    yield blocks
      .map((block) => block.split(/\r?\n/).filter((line) => line.startsWith("data:")))
      .filter((lines) => lines.length)
      .map((lines) => lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n"));
    if (done) return;
    if (performance.now() - rested < LONGEST_WORK) continue;
    // Without this a fast stream leaves no time to draw and to press Stop.
    await breath();
    rested = performance.now();
  }
}

function choiceIn(data) {
  let content;
  try {
    content = JSON.parse(data);
  } catch {
    throw new ServerError("The server sent something that is no part of an answer.");
  }
  if (content.error) throw new ServerError(content.error.message ?? String(content.error));
  return content.choices?.[0];
}

// Calls `said` with each piece of the answer. Returns the model that the server names, and why the answer ended.
export async function streamed(body, { chat, key, signal, said }) {
  const path = chat ? "v1/chat/completions" : "v1/completions";
  const response = await request(path, { key, signal, body: { ...body, stream: true } });
  const model = response.headers.get("x-rewarded-lines-model");
  let reason = "";
  try {
    for await (const together of events(response)) {
      const choices = together.filter((data) => data !== "[DONE]").map(choiceIn);
      reason = choices.findLast((choice) => choice?.finish_reason)?.finish_reason ?? reason;
      const pieces = choices.map((choice) => (chat ? choice?.delta?.content : choice?.text) ?? "");
      if (pieces.length) said(pieces.join(""));
      if (together.includes("[DONE]")) return { model, reason };
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
  }
  throw new ServerError("The connection ended before the answer did.");
}
