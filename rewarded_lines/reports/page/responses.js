// Responses beside each other for the same prompts: searched, sorted, in pages. What models wrote is text here.

const PAGE = 20;
const unpacked = new Map();
let latest = 0;

// The content of a block, unpacked once.
function content(id) {
  if (!unpacked.has(id)) unpacked.set(id, unpack(id).then(JSON.parse));
  return unpacked.get(id);
}

const recordsOf = (index) => content(`records-${state.run}-${index}`);

// The columns of the list, each a point with its records, and the prompts.
async function loaded() {
  const indices = compared();
  const [prompts, ...records] = await Promise.all([content(`prompts-${state.run}`), ...indices.map(recordsOf)]);
  const columns = indices.map((index, place) => ({ index, records: records[place] }));
  const find = (index) => columns.find((column) => column.index === index)?.records;
  return { prompts, columns, sft: find(SFT), chosen: find(state.chosen), other: find(state.other) };
}

// A pattern that finds the query as it is typed, upper or lower case; null for an empty one.
function pattern(query) {
  const literal = query.trim().replace(/[\\^$.*+?()[\]{}|/]/g, (character) => `\\${character}`);
  return literal ? new RegExp(literal, "giu") : null;
}

function matching(data, wanted) {
  const rows = data.prompts.which.map((_, row) => row);
  if (!wanted) return rows;
  const found = (text) => text.search(wanted) >= 0;
  const asked = data.prompts.texts.map(found);
  return rows.filter(
    (row) => asked[data.prompts.which[row]] || data.columns.some(({ records }) => found(records.responses[row])),
  );
}

// A score is null where the reward gave none; then there is no difference, either.
const difference = (one, other) => (one === null || other === null ? null : one - other);

// What rows are sorted by: a measure of the chosen point's response, or its difference to another's.
function sortKey(data) {
  const [kind, place] = state.sort.split(" ");
  const score = (records, row) => records.scores[Number(place)][row];
  const keys = {
    score: (row) => score(data.chosen, row),
    gain: (row) => difference(score(data.chosen, row), score(data.sft, row)),
    lead: (row) => (data.other ? difference(score(data.chosen, row), score(data.other, row)) : 0),
    kl: (row) => data.chosen.kl[row],
    words: (row) => data.chosen.words[row],
  };
  return keys[kind];
}

function sorted(rows, data) {
  if (state.sort === "prompt") return rows;
  const key = sortKey(data);
  const sign = state.order === "down" ? -1 : 1;
  // Rows without a value come last in both orders.
  const place = (row) => key(row) ?? sign * Infinity;
  const compare = (one, other) => (one === other ? 0 : sign * (one - other));
  return rows.sort((one, other) => compare(place(one), place(other)));
}

// A text with what was searched for marked; its direction and marks stay inside.
function text(written, wanted) {
  const made = element("div", { class: "text", dir: "auto" });
  if (written === "") return element("div", { class: "note" }, "empty");
  let from = 0;
  for (const hit of wanted ? written.matchAll(wanted) : []) {
    made.append(written.slice(from, hit.index), element("mark", {}, hit[0]));
    from = hit.index + hit[0].length;
  }
  made.append(written.slice(from));
  return made;
}

const short = (number) => String(Number(number.toPrecision(4))).replace("-", "−");

function scoreItem(name, number, gain, unit = "") {
  if (number === null) return element("div", {}, element("dt", {}, name), element("dd", { title: "no score" }, "–"));
  const shown = [element("dt", {}, name), element("dd", { title: `${number} ${unit}`.trim() }, short(number))];
  if (gain !== null) {
    const direction = gain > 0 ? "up" : gain < 0 ? "down" : "";
    shown.push(element("dd", { class: direction }, `(${gain > 0 ? "+" : ""}${short(gain)})`));
  }
  return element("div", {}, ...shown);
}

function answer(row, column, data, wanted) {
  const { records, index } = column;
  const scores = rewards.map((reward, place) => {
    const number = records.scores[place][row];
    const gain = index === SFT ? null : difference(number, data.sft.scores[place][row]);
    return scoreItem(reward.name, number, gain, reward.unit);
  });
  if (index !== SFT) scores.push(scoreItem("KL", records.kl[row], null, "nats"));
  scores.push(scoreItem("words", records.words[row], null));
  scores.push(element("div", {}, element("dt", {}, records.ended[row] ? "ended" : "cut off")));
  return element(
    "div",
    { class: "answer" },
    element("h4", {}, points[index].label),
    text(records.responses[row], wanted),
    element("dl", { class: "scores" }, ...scores),
  );
}

function rowElement(row, data, wanted) {
  const prompt = data.prompts.which[row];
  return element(
    "article",
    { class: "row" },
    element("h3", {}, `Prompt ${prompt + 1}`),
    text(data.prompts.texts[prompt], wanted),
    element("div", { class: "beside" }, ...data.columns.map((column) => answer(row, column, data, wanted))),
  );
}

function showPager(total) {
  const pages = Math.max(1, Math.ceil(total / PAGE));
  state.page = Math.min(state.page, pages - 1);
  byId("page").value = state.page + 1;
  byId("page").max = pages;
  byId("pages").textContent = `of ${pages}`;
  byId("back").disabled = state.page === 0;
  byId("next").disabled = state.page === pages - 1;
}

async function showResponses() {
  const turn = ++latest;
  byId("list").setAttribute("aria-busy", true);
  const data = await loaded();
  // Meanwhile another point may have been chosen.
  if (turn !== latest) return;
  const wanted = pattern(state.query);
  const rows = sorted(matching(data, wanted), data);
  showPager(rows.length);
  const from = state.page * PAGE;
  const page = rows.slice(from, from + PAGE);
  const range = page.length ? `, ${from + 1} to ${from + page.length} shown` : "";
  byId("count").textContent = `${rows.length} of ${data.prompts.which.length} responses${range}`;
  byId("list").replaceChildren(...page.map((row) => rowElement(row, data, wanted)));
  byId("list").setAttribute("aria-busy", false);
}

function showSorts() {
  const chosen = points[state.chosen].label;
  const named = (kind, label) => rewards.map(({ name }, place) => [`${kind} ${place}`, label(name)]);
  const options = [
    ["prompt", "order of prompts"],
    ...named("score", (name) => `${name} of ${chosen}`),
    ...named("gain", (name) => `${name}, difference to SFT`),
    ...(state.other === null ? [] : named("lead", (name) => `${name}, difference to ${points[state.other].label}`)),
    ["kl", `KL of ${chosen}`],
    ["words", `length of ${chosen}`],
  ];
  if (!options.some(([key]) => key === state.sort)) state.sort = "prompt";
  byId("sort").replaceChildren(...options.map(([key, label]) => element("option", { value: key }, label)));
  byId("sort").value = state.sort;
  byId("order").disabled = state.sort === "prompt";
}

// Show another page, from its first prompt on.
function turnTo(page) {
  change({ page });
  byId("count").scrollIntoView({ block: "start" });
}

function startResponses() {
  byId("search").addEventListener("submit", (event) => event.preventDefault());
  byId("query").addEventListener("input", () => change({ query: byId("query").value, page: 0 }));
  byId("sort").addEventListener("change", () => change({ sort: byId("sort").value, page: 0 }));
  byId("order").addEventListener("change", () => change({ order: byId("order").value, page: 0 }));
  byId("back").addEventListener("click", () => turnTo(state.page - 1));
  byId("next").addEventListener("click", () => turnTo(state.page + 1));
  byId("page").addEventListener("change", () => turnTo(Math.max(0, Math.round(Number(byId("page").value)) - 1)));
  view(["chosen", "other", "sort"], showSorts);
}
