// Numbers as text, elements without markup, and packed blocks unpacked.

const byId = (id) => document.getElementById(id);

// An element with attributes, listeners (`onclick`) and children; a child that is a string becomes text, never markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// A number with a real minus sign, which never reads −0.00.
function fixed(value, places) {
  const text = value.toFixed(places);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

function signed(value, places) {
  const text = fixed(value, places);
  return Number(value.toFixed(places)) > 0 ? `+${text}` : text;
}

function bracketed(estimate, places) {
  if (!estimate) return "–";
  const [value, low, high] = estimate.map((number) => fixed(number, places));
  // The brackets stay together where a column is narrow.
  return `${value} [${low},\u00a0${high}]`;
}

function plusMinus(estimate, places) {
  if (!estimate) return "–";
  const [value, low, high] = estimate;
  return `${fixed(value, places)} ±${fixed((high - low) / 2, places)}`;
}

// The decimals at which the middle half-width of intervals shows two digits. A width may be rounding only.
function decimals(estimates) {
  const wide = ([, low, high]) => high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high));
  const widths = estimates.filter((one) => one && wide(one)).map(([, low, high]) => (high - low) / 2);
  if (!widths.length) return 2;
  const middle = widths.sort((one, other) => one - other)[Math.floor(widths.length / 2)];
  return Math.min(12, Math.max(0, 1 - Math.floor(Math.log10(middle))));
}

const withUnit = (measure) => (measure.unit ? `${measure.name} [${measure.unit}]` : measure.name);

async function unpack(id) {
  const packed = atob(byId(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let place = 0; place < packed.length; place++) bytes[place] = packed.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
