// The drawings of a sweep's page, by Plotly; drawn anew whenever live.js brings new scores. The table has their numbers.
import { loaded } from "./loading.js";

const box = document.getElementById("drawings-box");
const dark = matchMedia("(prefers-color-scheme: dark)");
let shown = "";

function traces(drawing) {
  if (drawing.kind === "cells") {
    return [{
      type: "heatmap", x: drawing.columns.map(String), y: drawing.rows.map(String), z: drawing.cells, colorscale: "Cividis",
      xgap: 1, ygap: 1, hovertemplate: `${drawing.x} %{x} · ${drawing.y} %{y}<br>%{z:.4f}<extra></extra>`,
      colorbar: { thickness: 12, outlinewidth: 0 },
    }];
  }
  return Object.entries(drawing.series).map(([name, pairs]) => {
    const single = name === "each point";
    return {
      type: "scatter", name, x: pairs.map((pair) => pair[0]), y: pairs.map((pair) => pair[1]),
      mode: single ? "markers" : "lines+markers", line: { shape: drawing.kind === "steps" ? "hv" : "linear" },
      marker: { size: single ? 6 : 7, opacity: single ? 0.6 : 1 },
    };
  });
}

function placeOf(drawing) {
  const id = `drawing-${drawing.name}`;
  const known = document.getElementById(id);
  if (known !== null) return known;
  const place = document.createElement("div");
  place.id = id;
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", `${drawing.title}: ${drawing.y} by ${drawing.x}`);
  return box.appendChild(place);
}

async function draw() {
  const text = document.getElementById("drawings-data")?.textContent ?? "[]";
  if (text === shown) return;
  const drawings = JSON.parse(text);
  if (drawings.length === 0) return;
  shown = text;
  document.getElementById("drawn").hidden = false;
  if (typeof Plotly === "undefined") await loaded(box.dataset.plotly);
  const style = getComputedStyle(box);
  const font = { family: style.fontFamily, size: 12, color: style.color };
  const line = { automargin: true, fixedrange: true, gridcolor: "rgba(128,128,128,.25)", zeroline: false };
  const places = drawings.map(placeOf); // all of them first: how wide each is depends on how many there are
  for (const [index, drawing] of drawings.entries()) {
    const category = drawing.kind === "cells" ? { type: "category", showgrid: false } : {};
    await Plotly.react(places[index], traces(drawing), {
      height: 340, margin: { t: 40, r: 8, b: 44, l: 8 }, title: { text: drawing.title, font: { ...font, size: 14 }, x: 0 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font, legend: { orientation: "h", y: -0.25 },
      xaxis: { ...line, ...category, title: { text: drawing.x } }, yaxis: { ...line, ...category, title: { text: drawing.y } },
    }, { responsive: true, displayModeBar: false });
  }
  box.dataset.drawn = String(drawings.length);
}

new MutationObserver(draw).observe(document.getElementById("live"), { childList: true });
dark.addEventListener("change", () => {
  shown = "";
  draw();
});
draw();
