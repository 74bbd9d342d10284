// The front, drawn by plotly once it is unpacked. Plotly reads tags in its texts, so names are made plain first.

const plot = byId("plot");
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const touch = matchMedia("(pointer: coarse)");
const dark = matchMedia("(prefers-color-scheme: dark)");

function hoverText(index) {
  const lines = measures.map((measure, place) => {
    const text = bracketed(points[index].values[place], places[place]);
    return `${plain(measure.name)}: ${text} ${plain(measure.unit)}`.trimEnd();
  });
  return [`<b>${plain(points[index].label)}</b>`, ...lines].join("<br>");
}

function coordinates(indices) {
  return {
    type: "scatter",
    x: indices.map((index) => value(index, state.x)),
    y: indices.map((index) => value(index, state.y)),
    customdata: indices,
    hovertext: indices.map(hoverText),
    hoverinfo: "text",
  };
}

function methodTrace(method) {
  const ink = method.colours?.[dark.matches ? 1 : 0] ?? colour("ink");
  return {
    ...coordinates(method.points),
    mode: method.line ? "lines+markers" : "markers",
    line: { color: ink, width: 1.5 },
    marker: {
      color: ink,
      symbol: method.mark,
      size: method.colours ? 10 : 15,
      opacity: method.points.map((index) => (qualifies(index) ? 1 : 0.2)),
      line: { color: method.colours ? colour("paper") : ink, width: 1 },
    },
  };
}

function bars(indices, measure, ink) {
  const ends = indices.map((index) => points[index].values[measure] ?? [0, 0, 0]);
  return {
    type: "data",
    symmetric: false,
    array: ends.map(([middle, , high]) => high - middle),
    arrayminus: ends.map(([middle, low]) => middle - low),
    color: ink,
    thickness: 1.2,
    width: 0,
  };
}

// Whether a point lies in the right half of the picture, where its name stands on its left.
function rightHalf(index) {
  const all = points.map((_, other) => value(other, state.x));
  return value(index, state.x) > (Math.min(...all) + Math.max(...all)) / 2;
}

// Rings around the points that are compared, with their intervals and names.
function comparedTrace() {
  const indices = compared();
  const ink = colour("ink");
  return {
    ...coordinates(indices),
    mode: "markers+text",
    text: indices.map((index) => plain(points[index].label)),
    textposition: indices.map((index) => (rightHalf(index) ? "top left" : "top right")),
    cliponaxis: false,
    textfont: { size: 12, color: ink },
    marker: {
      color: ink,
      symbol: indices.map((index) => (index === SFT ? "star" : "circle-open")),
      size: indices.map((index) => (index === SFT ? 13 : 19)),
      line: { color: ink, width: 2 },
    },
    error_x: bars(indices, state.x, ink),
    error_y: bars(indices, state.y, ink),
  };
}

function axis(measure) {
  const direction = measure.better ? `, ${measure.better} is better` : "";
  return {
    title: { text: plain(withUnit(measure)) + direction, standoff: 8 },
    gridcolor: colour("grid"),
    linecolor: colour("line"),
    zeroline: false,
    automargin: true,
  };
}

function layout() {
  return {
    paper_bgcolor: colour("paper"),
    plot_bgcolor: colour("paper"),
    font: { family: "system-ui, sans-serif", size: 13, color: colour("ink") },
    margin: { l: 10, r: 12, t: 12, b: 10 },
    showlegend: false,
    hovermode: "closest",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
    // A finger that drags over the picture scrolls the page.
    dragmode: touch.matches ? false : "zoom",
    uirevision: `${state.x} ${state.y}`,
    xaxis: axis(measures[state.x]),
    yaxis: axis(measures[state.y]),
  };
}

function drawFront() {
  if (!window.Plotly) return;
  const traces = methods.filter((method) => state.shown.has(method.name)).map(methodTrace);
  // The rings lie above, but a click on one is a click on its point.
  window.Plotly.react(plot, [...traces, comparedTrace()], layout(), { displayModeBar: false, responsive: true });
}

async function startFront() {
  const script = element("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);
  plot.replaceChildren();
  drawFront();
  plot.on("plotly_click", (event) => choose(event.points[0].customdata));
  plot.setAttribute("aria-busy", false);
  performance.mark("front");
}

view(["chosen", "other", "x", "y", "shown", "least"], drawFront);
dark.addEventListener("change", drawFront);
