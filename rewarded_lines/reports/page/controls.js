// Axes, methods with their sliders, minima, the table of points, and the numbers of what is chosen.

const SHAPES = {
  square: "M1 1h8v8H1z",
  circle: "M5 .7a4.3 4.3 0 1 1-.01 0z",
  "triangle-up": "M5 .8 9.6 9H.4z",
  "triangle-down": "M5 9.2.4 1h9.2z",
  cross: "M3.4.8h3.2v2.6h2.6v3.2H6.6v2.6H3.4V6.6H.8V3.4h2.6z",
  diamond: "M5 .3 9.7 5 5 9.7.3 5z",
  "triangle-left": "M.8 5 9 .4v9.2z",
  "triangle-right": "M9.2 5 1 9.6V.4z",
  pentagon: "M5 .4l4.6 3.4-1.8 5.5H2.2L.4 3.8z",
  x: "M2.7.6 5 2.9 7.3.6l2.1 2.1L7.1 5l2.3 2.3-2.1 2.1L5 7.1 2.7 9.4.6 7.3 2.9 5 .6 2.7z",
};

function mark(method) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const ring = !(method.mark in SHAPES);
  path.setAttribute("d", SHAPES[method.mark] ?? SHAPES.circle);
  path.style.fill = ring ? "none" : `light-dark(${method.colours.join()})`;
  path.setAttribute("stroke", ring ? "currentColor" : "none");
  made.setAttribute("viewBox", "0 0 10 10");
  made.setAttribute("aria-hidden", "true");
  made.append(path);
  return made;
}

function pointOptions(indices) {
  return indices.map((index) => element("option", { value: index }, points[index].label));
}

function axisSelect(name) {
  const select = byId(`axis-${name}`);
  select.append(...measures.map((measure, index) => element("option", { value: index }, withUnit(measure))));
  select.addEventListener("change", () => change({ [name]: Number(select.value) }));
  view([name], () => (select.value = state[name]));
}

// A slider steps through a method's points in the order of λ.
function slider(method) {
  const output = element("output");
  const range = element("input", {
    type: "range",
    min: 0,
    max: method.points.length - 1,
    value: Math.floor(method.points.length / 2),
    "aria-label": `Point of ${method.label}`,
    oninput: () => choose(method.points[Number(range.value)]),
  });
  const only = element("button", { type: "button", onclick: () => choose(method.points[0]) }, "Choose");
  const single = method.points.length === 1;
  view(["chosen", "shown"], () => {
    const place = method.points.indexOf(state.chosen);
    if (place >= 0) range.value = place;
    const { label, place: text } = points[method.points[Number(range.value)]];
    range.setAttribute("aria-valuetext", text || label);
    output.textContent = text || label;
    range.disabled = only.disabled = !state.shown.has(method.name);
  });
  return element("div", { class: "slide" }, single ? only : range, output);
}

function methodControl(method) {
  const box = element("input", { type: "checkbox", checked: true });
  box.addEventListener("change", () => {
    const shown = new Set(state.shown);
    shown[box.checked ? "add" : "delete"](method.name);
    change({ shown });
  });
  const volume = element("span", { class: "volume" }, method.volume);
  const label = element("label", {}, box, mark(method), element("span", {}, method.label), volume);
  return element("div", { class: "method" }, label, slider(method));
}

// A minimum: a slider and a number field that say the same; an empty field is no minimum.
function boundControl(measure) {
  const values = points.map((_, index) => value(index, measure));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const name = withUnit(measures[measure]);
  const step = 10 ** -places[measure];
  // Ends on whole steps, the upper one not above the best point, so that something always qualifies.
  const min = Math.floor(low / step) * step;
  const max = Math.max(min + step, Math.floor(high / step) * step);
  const set = (bound) => {
    const least = new Map(state.least);
    if (bound === null) least.delete(measure);
    else least.set(measure, bound);
    change({ least });
  };
  const range = element("input", { type: "range", min, max, step, "aria-label": `Least ${name}` });
  const field = element("input", { type: "number", step: "any", id: `least-${measure}`, placeholder: "none" });
  range.addEventListener("input", () => {
    const bound = Number(Number(range.value).toFixed(places[measure]));
    set(bound <= low ? null : bound);
  });
  field.addEventListener("input", () => set(field.value === "" ? null : Number(field.value)));
  view(["least"], () => {
    const bound = state.least.get(measure);
    range.value = bound ?? min;
    range.setAttribute("aria-valuetext", bound === undefined ? "no minimum" : fixed(bound, places[measure]));
    // A field that is being typed in says what it says.
    if (document.activeElement !== field) field.value = bound === undefined ? "" : bound;
  });
  return element("div", { class: "bound" }, element("label", { for: field.id }, `${name} ≥`), range, field);
}

function showQualifying() {
  const candidates = points.map((_, index) => index).filter((index) => index !== SFT && visible(index));
  const count = candidates.filter(qualifies).length;
  byId("qualify").textContent = state.least.size ? `${count} of ${candidates.length} points qualify.` : "";
  byId("unbound").disabled = state.least.size === 0;
}

function pointRow(index) {
  const button = element("button", { type: "button", onclick: () => choose(index) }, points[index].label);
  const cells = points[index].values.map((estimate, place) => element("td", {}, plusMinus(estimate, places[place])));
  const meets = element("td");
  const row = element("tr", {}, element("th", { scope: "row" }, button), ...cells, meets);
  view(["chosen", "shown", "least"], () => {
    const out = state.least.size > 0 && !qualifies(index);
    row.hidden = !visible(index);
    row.classList.toggle("chosen", state.chosen === index);
    row.classList.toggle("out", out);
    button.setAttribute("aria-pressed", state.chosen === index);
    meets.textContent = state.least.size === 0 || index === SFT ? "" : out ? "no" : "yes";
  });
  return row;
}

function pointsTable() {
  const heads = measures.map((measure) => `${measure.role === "audit" ? "audit " : ""}${withUnit(measure)}`);
  const cells = ["point", ...heads, "qualifies"].map((text) => element("th", { scope: "col" }, text));
  byId("points").append(
    element("thead", {}, element("tr", {}, ...cells)),
    element("tbody", {}, ...points.map((_, index) => pointRow(index))),
  );
}

function showNumbers() {
  const columns = compared();
  const row = (name, about, texts) => {
    const head = element("th", { scope: "row", title: about }, name);
    return element("tr", {}, head, ...texts.map((text) => element("td", {}, text)));
  };
  const rows = measures.map((measure, place) => {
    const texts = columns.map((index) => bracketed(points[index].values[place], places[place]));
    return row(withUnit(measure), measure.about, texts);
  });
  const more = [
    ["ended", "share of responses that end by themselves", ({ ended }) => `${fixed(100 * ended, 0)}%`],
    ["distinct-2", "different pairs of words among all pairs", ({ distinct2 }) => fixed(distinct2, 2)],
    ["adds", "what its method's hypervolume would lose without it", ({ adds }) => String(Number(adds.toPrecision(3)))],
  ];
  rows.push(...more.map(([name, about, text]) => row(name, about, columns.map((index) => text(points[index])))));
  const heads = ["", ...columns.map((index) => points[index].label)];
  byId("numbers").replaceChildren(
    element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows),
  );
  byId("chosen-title").textContent = `Chosen: ${points[state.chosen].label}`;
}

function showCommand() {
  const command = points[state.chosen].commands[state.run];
  byId("command").textContent = command;
  byId("copy").hidden = command.startsWith("#");
  byId("copied").textContent = "";
}

async function copyCommand() {
  const told = byId("copied");
  try {
    await navigator.clipboard.writeText(byId("command").textContent);
    told.textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(byId("command"));
    told.textContent = "The browser does not let this page copy; the command is selected.";
  }
}

function startControls() {
  for (const id of ["scope", "note", "volume"]) byId(id).textContent = overview[id];
  axisSelect("x");
  axisSelect("y");
  byId("methods").append(...methods.map(methodControl));
  byId("bounds").append(...objectives.map(boundControl));
  byId("unbound").addEventListener("click", () => change({ least: new Map() }));
  pointsTable();
  const other = byId("other");
  other.append(element("option", { value: "" }, "no other point"));
  other.append(...methods.map((one) => element("optgroup", { label: one.label }, ...pointOptions(one.points))));
  other.addEventListener("change", () => change({ other: other.value === "" ? null : Number(other.value) }));
  const run = byId("run");
  run.append(...overview.runs.map((name, index) => element("option", { value: index }, name)));
  run.addEventListener("change", () => change({ run: Number(run.value) }));
  byId("run-label").hidden = overview.runs.length < 2;
  byId("copy").addEventListener("click", copyCommand);
  view(["least", "shown"], showQualifying);
  view(["chosen", "other"], showNumbers);
  view(["chosen", "run"], showCommand);
}
