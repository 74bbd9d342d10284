// The page: asks the server what it serves, then chats with one preference or with two side by side.

import { FrontChart, isServed, pointLabel } from "./front_chart.js";
import { byId, element } from "./page_parts.js";
import { preferenceControl } from "./preference.js";
import { request, streamed } from "./stream.js";
import { spoken, standing } from "./weights.js";

const ENDS = { length: "ended at the most tokens allowed", abort: "stopped" };

let offered;
let chart;
let controls = [];
// The chat so far: what was said, and the answer of each side. A side that was not asked has the first one's answer.
let turns = [];
let running = null;
// By name: one for all requests, one to change the weights of a server of whole models.
const keys = {};

const comparing = () => byId("compare").checked;
const shown = () => controls.slice(0, comparing() ? 2 : 1);
const key = (name = "API key") => keys[name] ?? "";
const label = ({ row, weights }) => `${row}, ${spoken(weights, offered.step)}`;

function told(error, name = "API key") {
  byId("problem").textContent = error?.message ?? "";
  if (error && [401, 403].includes(error.status)) {
    byId("key-name").textContent = name;
    byId("unlock").hidden = false;
    byId("key").focus();
  }
}

// ---- where one stands ------------------------------------------------------------------------------------------

function stand() {
  const names = shown().length > 1 ? ["A", "B"] : ["here"];
  const places = shown().map(({ state }) => standing(offered.points, state.row, state.weights, offered.step));
  const rings = places.map((place, index) => place && { means: place.means, name: names[index] });
  chart?.stand(rings.filter(Boolean));
  const how = { measured: "measured here", between: "between two measured points", nearest: "of the nearest measured point" };
  byId("standing").textContent = places
    .map((place, index) => {
      if (!place) return `${names[index]}: this merge was not measured.`;
      const means = offered.rewards.map(({ name, unit }) => `${name} ${place.means[name].toPrecision(3)} ${unit ?? ""}`.trim());
      return `${names[index]}: ${means.join(", ")} (${how[place.how]}).`;
    })
    .join(" ");
}

function choose(point) {
  // The point may belong to the second preference: the one that was touched last.
  const control = shown().includes(chart.touched) ? chart.touched : controls[0];
  control.set({ row: point.row, weights: { ...control.state.weights, ...point.weights } });
  stand();
}

function showFront() {
  const measured = offered.points.length > 0 && offered.rewards.length > 0;
  byId("front").hidden = !measured;
  chart = measured ? new FrontChart(offered, choose) : null;
  if (!measured) return;
  byId("plot").replaceChildren(chart.drawing);
  byId("axes").replaceChildren(...chart.selects());
  byId("legend").replaceChildren(...chart.legend());
  const points = offered.points.filter((point) => isServed(point, offered));
  // Named points first, then those of the front.
  points.sort((one, other) => Boolean(other.name) - Boolean(one.name) || Boolean(other.on_front) - Boolean(one.on_front));
  const options = points.map((point, index) => element("option", { value: index }, pointLabel(point, offered)));
  byId("points").replaceChildren(element("option", { value: "" }, "choose …"), ...options);
  byId("points").onchange = ({ target }) => target.value && choose(points[target.value]);
}

function showControls() {
  const whole = offered.mode === "whole";
  if (whole) byId("compare").checked = false;
  byId("compare-label").hidden = whole;
  byId("apply").hidden = !whole;
  controls = ["A", "B"].map((name) => {
    const control = preferenceControl(name, offered, () => {
      if (chart) chart.touched = control;
      stand();
    });
    return control;
  });
  arrange();
}

function arrange() {
  controls[0].rename(comparing() ? "A" : offered.mode === "whole" ? "The server's preference" : "My preference");
  byId("preferences").replaceChildren(...shown().map(({ box }) => box));
  stand();
}

// ---- the chat --------------------------------------------------------------------------------------------------

function messagesOf(side, text) {
  const before = turns.flatMap(({ said, answers }) => [
    { role: "user", content: said },
    { role: "assistant", content: answers[side] ?? answers[0] },
  ]);
  return [...before, { role: "user", content: text }];
}

function bodyFor(side, text) {
  const { row, weights } = controls[side].state;
  const asked = offered.chat === false ? { prompt: text } : { messages: messagesOf(side, text) };
  // A server of whole models has one preference for all requests, under the name `default`.
  const asks = offered.mode === "whole" ? { model: "default" } : { model: offered.base, preference: weights, row };
  const number = (id) => byId(id).valueAsNumber;
  return { ...asks, ...asked, seed: number("seed"), temperature: number("temperature"), max_tokens: number("tokens") };
}

function showCommand(body) {
  const path = offered.chat === false ? "v1/completions" : "v1/chat/completions";
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const withKey = key() ? ' -H "Authorization: Bearer $API_KEY"' : "";
  byId("command").textContent = `curl ${new URL(path, document.baseURI)} -H 'Content-Type: application/json'${withKey} \\\n  -d '${quoted}'`;
}

// Keeps the end in sight, but not for somebody who scrolled up to read.
function followed() {
  const log = byId("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 80) log.scrollTop = log.scrollHeight;
}

// Asks for the answer of one side and shows it as it comes. Returns its text, or null after an error.
async function answer(side, text, box, signal) {
  const heading = element("h3", {}, label(controls[side].state));
  const words = document.createTextNode("");
  const before = offered.chat === false ? [element("b", {}, text)] : [];
  const note = element("p", { class: "note" });
  box.append(heading, element("div", { class: "text" }, ...before, words), note);
  const said = (piece) => {
    words.appendData(piece);
    followed();
  };
  const body = bodyFor(side, text);
  showCommand(body);
  try {
    const { model, reason } = await streamed(body, { chat: offered.chat !== false, key: key(), signal, said });
    if (model) heading.textContent = model;
    note.textContent = ENDS[reason] ?? "";
    return words.data;
  } catch (error) {
    const stopped = error.name === "AbortError";
    note.textContent = stopped ? "stopped" : error.message;
    note.classList.toggle("error", !stopped);
    if (error.status === 401) told(error);
    return null;
  }
}

async function ask(text) {
  const log = byId("log");
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  // Read aloud once it is whole, not piece by piece.
  log.setAttribute("aria-busy", true);
  const boxes = shown().map(() => element("div", { class: "answer" }));
  const user = offered.chat === false ? [] : [element("p", { class: "said" }, text)];
  log.append(element("div", { class: "turn" }, ...user, element("div", { class: "beside" }, ...boxes)));
  log.scrollTop = log.scrollHeight;
  const answers = await Promise.all(boxes.map((box, side) => answer(side, text, box, running.signal)));
  if (answers.every((one) => one !== null)) turns.push({ said: text, answers });
  else byId("message").value ||= text;
  log.setAttribute("aria-busy", false);
  byId("send").disabled = false;
  byId("stop").disabled = true;
  running = null;
}

function send(event) {
  event.preventDefault();
  const text = byId("message").value;
  if (running || !text.trim() || !byId("ask").reportValidity()) return;
  byId("message").value = "";
  told(null);
  void ask(text);
}

// ---- the server ------------------------------------------------------------------------------------------------

async function apply() {
  const { row, weights } = controls[0].state;
  byId("applied").textContent = "Changing …";
  byId("apply").disabled = true;
  try {
    const response = await request("preference", { key: key("Admin key"), body: { preference: weights, row } });
    const { current, row: now } = await response.json();
    controls[0].set({ weights: current ?? weights, row: now ?? row });
    byId("applied").textContent = `The server now answers with ${label(controls[0].state)}.`;
    told(null);
  } catch (error) {
    byId("applied").textContent = "";
    told(error, "Admin key");
  }
  byId("apply").disabled = false;
  stand();
}

async function start() {
  try {
    offered = await (await request("preferences", { key: key() })).json();
  } catch (error) {
    byId("scope").textContent = "";
    return told(error);
  }
  // Policies that were trained for mixtures are weighed by reward.
  offered.policies = offered.weights ?? offered.policies;
  const rewards = offered.rewards.map(({ name }) => name);
  offered.points = offered.points.filter(({ means }) => rewards.every((name) => Number.isFinite(means[name])));
  told(null);
  byId("unlock").hidden = true;
  const chat = offered.chat !== false;
  byId("title").textContent = document.title = offered.base;
  byId("scope").textContent = `Merges of ${offered.policies.join(", ")}, one for each preference.`;
  byId("message-label").textContent = chat ? "Message" : "A text to go on from";
  byId("chat-title").textContent = chat ? "Chat" : "Answers";
  byId("tokens").value = offered.max_tokens ?? 256;
  byId("temperature").value = offered.temperature ?? 1;
  byId("main").hidden = false;
  showFront();
  showControls();
}

byId("compare").addEventListener("change", arrange);
byId("apply").addEventListener("click", apply);
byId("ask").addEventListener("submit", send);
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  byId("log").replaceChildren();
});
byId("message").addEventListener("keydown", (event) => {
  // Not while an input method composes a character.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  keys[byId("key-name").textContent] = byId("key").value;
  byId("key").value = "";
  byId("unlock").hidden = true;
  if (offered) told(null);
  else void start();
});
void start();
