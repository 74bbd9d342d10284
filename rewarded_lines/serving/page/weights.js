// Preferences as numbers: weights that sum to 1, their steps, the triangle of three, and where they stand on a front.

export function decimals(step) {
  return (step.toFixed(6).replace(/0+$/, "").split(".")[1] ?? "").length;
}

// Rounds every weight to the step; the largest takes what is left, so that the sum stays 1.
export function rounded(weights, step) {
  const places = decimals(step);
  const entries = Object.entries(weights).map(([name, value]) => [name, +(Math.round(value / step) * step).toFixed(places)]);
  const largest = entries.reduce((best, entry) => (entry[1] > best[1] ? entry : best));
  const others = entries.reduce((sum, entry) => (entry === largest ? sum : sum + entry[1]), 0);
  largest[1] = +(1 - others).toFixed(places);
  return Object.fromEntries(entries);
}

// Gives one policy a weight; the others share the rest as they shared it before.
export function moved(weights, name, value) {
  const others = Object.keys(weights).filter((other) => other !== name);
  const before = others.reduce((sum, other) => sum + weights[other], 0);
  const share = (other) => (before > 0 ? weights[other] / before : 1 / others.length);
  const entries = Object.keys(weights).map((key) => [key, key === name ? value : (1 - value) * share(key)]);
  return Object.fromEntries(entries);
}

export function spoken(weights, step) {
  const entries = Object.entries(weights);
  return entries.length ? entries.map(([name, value]) => `${name} ${value.toFixed(decimals(step))}`).join(", ") : "base";
}

// Places a preference among three corners, each [x, y].
export function placeAmong(corners, weights) {
  const values = Object.values(weights);
  return [0, 1].map((axis) => corners.reduce((sum, corner, index) => sum + values[index] * corner[axis], 0));
}

// The reverse; a place outside the triangle gives a preference on its edge.
export function weightsAt(corners, names, [x, y]) {
  const [[ax, ay], [bx, by], [cx, cy]] = corners;
  const area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy);
  const first = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / area;
  const second = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / area;
  const inside = [first, second, 1 - first - second].map((value) => Math.max(0, value));
  const sum = inside.reduce((total, value) => total + value, 0);
  return Object.fromEntries(names.map((name, index) => [name, inside[index] / sum]));
}

const distance = (one, other) => Object.keys(one).reduce((sum, name) => sum + Math.abs(one[name] - (other[name] ?? 0)), 0);

function between(lower, upper, share) {
  const names = Object.keys(lower.means);
  return Object.fromEntries(names.map((name) => [name, (1 - share) * lower.means[name] + share * upper.means[name]]));
}

// Returns {means, how}: the scores where a preference stands on a row, or null where the row was not measured.
// how: "measured"; "between" two measured points, on the line that joins them; or the "nearest" measured point.
export function standing(points, row, weights, step) {
  const own = points.filter((point) => point.row === row && Object.keys(point.weights).length);
  if (!own.length) return null;
  const near = own.reduce((best, point) => (distance(point.weights, weights) < distance(best.weights, weights) ? point : best));
  if (distance(near.weights, weights) < step / 2) return { means: near.means, how: "measured" };
  const [name] = Object.keys(weights);
  const at = (point) => point.weights[name] ?? 0;
  const lower = own.filter((point) => at(point) <= weights[name]).sort((one, other) => at(other) - at(one))[0];
  const upper = own.filter((point) => at(point) > weights[name]).sort((one, other) => at(one) - at(other))[0];
  if (Object.keys(weights).length > 2 || !lower || !upper) return { means: near.means, how: "nearest" };
  return { means: between(lower, upper, (weights[name] - at(lower)) / (at(upper) - at(lower))), how: "between" };
}
