// What is on the page and what is chosen; whoever changes a part has everything that shows it drawn again.

const overview = JSON.parse(byId("overview").textContent);
const { measures, methods, points } = overview;
const SFT = points.findIndex((point) => point.method === "sft");
const rewards = measures.filter((measure) => measure.role !== "cost");
const objectives = measures.flatMap((measure, index) => (measure.role === "reward" ? [index] : []));
const costs = measures.flatMap((measure, index) => (measure.role === "cost" ? [index] : []));
const places = measures.map((_, index) => decimals(points.map((point) => point.values[index])));

const state = {
  chosen: overview.start,
  other: null,
  run: 0,
  // A single reward is drawn over KL.
  x: objectives.length > 1 ? objectives[0] : costs[0],
  y: objectives.length > 1 ? objectives[1] : objectives[0],
  shown: new Set(methods.map((method) => method.name)),
  least: new Map(),
  query: "",
  sort: "prompt",
  order: "down",
  page: 0,
};
const views = [];

// Have `show` called at the start and whenever one of `parts` changes.
function view(parts, show) {
  views.push({ parts, show });
}

function change(parts) {
  Object.assign(state, parts);
  for (const { parts: wanted, show } of views) if (wanted.some((name) => name in parts)) show();
}

const choose = (index) => change({ chosen: index, page: 0 });
const value = (index, measure) => points[index].values[measure]?.[0] ?? null;
const methodOf = (index) => methods.find((method) => method.points.includes(index));
const visible = (index) => index === SFT || state.shown.has(points[index].method);

// Whether a point meets every minimum; SFT is no candidate.
function qualifies(index) {
  return index !== SFT && [...state.least].every(([measure, bound]) => value(index, measure) >= bound);
}

// SFT, the chosen point and the other one, each once.
const compared = () => [...new Set([SFT, state.chosen, ...(state.other === null ? [] : [state.other])])];
