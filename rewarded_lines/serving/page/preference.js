// The control of a preference: a slider for two policies, a slider each for more, and a triangle for three.

import { element, freshId, shape } from "./page_parts.js";
import { decimals, moved, placeAmong, rounded, spoken, weightsAt } from "./weights.js";

const CORNERS = [[100, 14], [186, 162], [14, 162]];

function slider(name, step, label, change) {
  // The scores at this place are read with the slider, but not again at each step of it.
  const input = element("input", { type: "range", min: 0, max: 1, step, "aria-label": label, "aria-describedby": "standing" });
  input.addEventListener("input", () => change(name, input.valueAsNumber));
  return input;
}

function triangle(names, change) {
  const dot = shape("circle", { r: 8, class: "dot" });
  const words = names.map((name, index) => {
    const [x, y] = CORNERS[index];
    const anchor = ["middle", "end", "start"][index];
    return shape("text", { x, y: index ? y + 16 : y - 5, "text-anchor": anchor }, name);
  });
  const area = shape("polygon", { points: CORNERS.map((corner) => corner.join()).join(" ") });
  // The sliders below say and do the same for a keyboard and a screen reader.
  const drawing = shape("svg", { viewBox: "0 0 200 182", class: "triangle", "aria-hidden": true }, area, ...words, dot);
  const follow = (event) => {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    change(weightsAt(CORNERS, names, [x, y]));
  };
  drawing.addEventListener("pointerdown", (event) => {
    drawing.setPointerCapture(event.pointerId);
    follow(event);
  });
  drawing.addEventListener("pointermove", (event) => event.buttons && follow(event));
  return { drawing, show: (weights) => placeAmong(CORNERS, weights).forEach((at, axis) => dot.setAttribute(["cx", "cy"][axis], at)) };
}

function rowChoice(rows, change) {
  const select = element("select", {}, ...rows.map((row) => element("option", { value: row.name }, row.label ?? row.name)));
  select.addEventListener("change", () => change(select.value));
  return select;
}

// Builds a control with `state`, {row, weights}; `changed` is called after each change by the user.
export function preferenceControl(title, offered, changed) {
  const { policies, rows, step } = offered;
  const legend = element("legend", {}, title);
  const told = element("output", { class: "told", "aria-live": "off" });
  const state = { row: offered.row, weights: { ...offered.current } };
  const set = (next) => {
    Object.assign(state, next, next.weights && { weights: rounded(next.weights, step) });
    show();
  };
  const change = (next) => {
    set(next);
    changed();
  };
  const choice = rowChoice(rows, (row) => change({ row }));
  const sliders = (policies.length === 2 ? policies.slice(0, 1) : policies).map((name) =>
    slider(name, step, `Weight of ${name}`, (policy, value) => change({ weights: moved(state.weights, policy, value) })),
  );
  const drawn = policies.length === 3 ? triangle(policies, (weights) => change({ weights })) : null;

  function show() {
    choice.value = state.row;
    told.value = spoken(state.weights, step);
    sliders.forEach((input, index) => {
      input.value = state.weights[policies[index]];
      const alone = `${policies[index]} ${state.weights[policies[index]].toFixed(decimals(step))}`;
      input.setAttribute("aria-valuetext", policies.length === 2 ? told.value : alone);
    });
    drawn?.show(state.weights);
  }

  const ends = (index) => element("span", { "aria-hidden": true }, policies[index]);
  const lines =
    policies.length === 2
      ? [element("div", { class: "slide" }, ends(1), sliders[0], ends(0))]
      : sliders.map((input, index) => element("div", { class: "slide" }, ends(index), input));
  const method = element("label", { class: "method", hidden: rows.length < 2 }, "Merge ", choice);
  const box = element("fieldset", { id: freshId("preference") }, legend, method, ...(drawn ? [drawn.drawing] : []), ...lines, told);
  show();
  return { box, state, set, rename: (name) => legend.replaceChildren(name) };
}
