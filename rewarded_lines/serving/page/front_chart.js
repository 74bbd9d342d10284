// The front of the run: every measured point, a line for each merge method, and rings where one stands.

import { element, shape } from "./page_parts.js";
import { spoken } from "./weights.js";

const WIDTH = 420;
const HEIGHT = 300;
const MARGIN = { left: 52, right: 14, top: 12, bottom: 44 };
const INKS = 6;

function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push([value, value.toFixed(places)]);
  return found;
}

// Maps the values of a reward to pixels, with some room at both ends.
function scale(values, from, to) {
  const room = (Math.max(...values) - Math.min(...values) || 1) * 0.07;
  const [low, high] = [Math.min(...values) - room, Math.max(...values) + room];
  return { at: (value) => from + ((value - low) / (high - low)) * (to - from), ticks: ticks(low, high) };
}

const withUnit = ({ name, unit }) => (unit ? `${name} [${unit}]` : name);

// A run may have points, such as the base's, of methods that no request can ask for.
export const isServed = (point, offered) => offered.rows.some(({ name }) => name === point.row);

export function pointLabel(point, offered) {
  const row = offered.rows.find(({ name }) => name === point.row);
  const where = point.row === null ? "base" : `${row?.label ?? point.row}, ${spoken(point.weights, offered.step)}`;
  const means = Object.entries(point.means).map(([name, value]) => `${name} ${value.toPrecision(3)}`);
  return `${point.name ? `${point.name}: ` : ""}${where} (scores: ${means.join(", ")})`;
}

export class FrontChart {
  constructor(offered, choose) {
    this.offered = offered;
    this.choose = choose;
    this.measured = offered.rows.filter(({ name }) => offered.points.some((point) => point.row === name));
    this.axes = [0, Math.min(1, offered.rewards.length - 1)].map((index) => offered.rewards[index]);
    this.rings = [];
    this.drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    this.draw();
  }

  // The two rewards are the axes; more than two can be chosen from.
  selects() {
    if (this.offered.rewards.length < 3) return [];
    return ["Across", "Upwards"].map((word, axis) => {
      const options = this.offered.rewards.map(({ name }) => element("option", { selected: name === this.axes[axis].name }, name));
      const select = element("select", {}, ...options);
      select.addEventListener("change", () => {
        this.axes[axis] = this.offered.rewards[select.selectedIndex];
        this.draw();
      });
      return element("label", {}, `${word} `, select);
    });
  }

  ink(row) {
    const index = this.measured.findIndex(({ name }) => name === row);
    return index < 0 ? "base" : `row-${index % INKS}`;
  }

  legend() {
    return this.measured.map(({ name, label }) => {
      const line = shape("path", { d: "M0 6H28", class: `drawn ${this.ink(name)}` });
      return element("span", {}, shape("svg", { viewBox: "0 0 28 12", class: "swatch", "aria-hidden": true }, line), ` ${label ?? name}`);
    });
  }

  draw() {
    const [x, y] = this.axes;
    const values = (reward) => this.offered.points.map((point) => point.means[reward.name]);
    this.x = scale(values(x), MARGIN.left, WIDTH - MARGIN.right);
    this.y = scale(values(y), HEIGHT - MARGIN.bottom, MARGIN.top);
    this.above = shape("g");
    this.drawing.setAttribute("aria-label", `Measured points: ${withUnit(x)} across, ${withUnit(y)} upwards. The list below has the same points.`);
    this.drawing.replaceChildren(...this.frame(), ...this.lines(), ...this.offered.points.map((point) => this.dot(point)), this.above);
    this.stand(this.rings);
  }

  frame() {
    const [bottom, right] = [HEIGHT - MARGIN.bottom, WIDTH - MARGIN.right];
    const across = this.x.ticks.flatMap(([value, text]) => [
      shape("path", { d: `M${this.x.at(value)} ${bottom}V${MARGIN.top}`, class: "grid" }),
      shape("text", { x: this.x.at(value), y: bottom + 15, "text-anchor": "middle" }, text),
    ]);
    const upwards = this.y.ticks.flatMap(([value, text]) => [
      shape("path", { d: `M${MARGIN.left} ${this.y.at(value)}H${right}`, class: "grid" }),
      shape("text", { x: MARGIN.left - 6, y: this.y.at(value) + 4, "text-anchor": "end" }, text),
    ]);
    const [x, y] = this.axes.map(withUnit);
    const middle = (MARGIN.top + bottom) / 2;
    return [
      ...across,
      ...upwards,
      shape("path", { d: `M${MARGIN.left} ${MARGIN.top}V${bottom}H${right}`, class: "axis" }),
      shape("text", { x: (MARGIN.left + right) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, x),
      shape("text", { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }, y),
    ];
  }

  place(means) {
    return [this.x.at(means[this.axes[0].name]), this.y.at(means[this.axes[1].name])];
  }

  // Only with two policies do the points of a method have an order.
  lines() {
    const { points, policies } = this.offered;
    if (policies.length !== 2) return [];
    const at = (point) => point.weights[policies[0]] ?? 0;
    return this.measured.map(({ name }) => {
      const own = points.filter((point) => point.row === name).sort((one, other) => at(one) - at(other));
      return shape("polyline", { class: `drawn ${this.ink(name)}`, points: own.map((point) => this.place(point.means).join()).join(" ") });
    });
  }

  dot(point) {
    const [cx, cy] = this.place(point.means);
    const title = shape("title", {}, pointLabel(point, this.offered));
    const kind = `point ${this.ink(point.row)}${point.on_front ? " best" : ""}`;
    const dot = shape("circle", { cx, cy, r: point.on_front ? 5 : 3.5, class: kind }, title);
    if (isServed(point, this.offered)) dot.addEventListener("click", () => this.choose(point));
    return point.row === null ? shape("g", {}, dot, shape("text", { x: cx + 8, y: cy + 4 }, "base")) : dot;
  }

  // Shows where the preferences stand: [{means, name}], the name beside its ring.
  stand(rings) {
    this.rings = rings;
    const drawn = rings.flatMap(({ means, name }) => {
      const [cx, cy] = this.place(means);
      return [shape("circle", { cx, cy, r: 9, class: "ring" }), shape("text", { x: cx + 12, y: cy - 8, class: "ring-name" }, name)];
    });
    this.above.replaceChildren(...drawn);
  }
}
