// The heatmap of a merge's page, drawn by Plotly once it comes into view. Its numbers stand in the tables, too.
import { loaded } from "./loading.js";

const box = document.getElementById("heatmap");
const data = JSON.parse(document.getElementById("heatmap-data")?.textContent ?? "null");
const dark = matchMedia("(prefers-color-scheme: dark)");

if (box && data) {
  box.hidden = false;
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    loaded(box.dataset.plotly).then(begin);
  }, { rootMargin: "300px" }).observe(box);
}

function begin() {
  const plot = document.getElementById("plot");
  const places = data.stacks.map(() => plot.appendChild(document.createElement("div")));
  const draw = () => data.stacks.forEach((stack, index) => drawStack(places[index], stack));
  for (const choice of box.querySelectorAll("input[name=figure]")) choice.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  draw();
}

function drawStack(place, stack) {
  const figure = box.querySelector("input[name=figure]:checked").value;
  const style = getComputedStyle(box);
  const ink = style.color;
  const font = { family: style.fontFamily, size: 12, color: ink };
  const shares = figure !== "norm";
  const trace = {
    type: "heatmap",
    x: stack.layers,
    y: stack.modules,
    z: stack[figure],
    text: stack.shown,
    hovertemplate: "layer %{x} · %{y}<br>%{text}<extra></extra>",
    colorscale: "Cividis",
    xgap: 1,
    ygap: 1,
    hoverongaps: false,
    colorbar: { tickformat: shares ? ".1%" : ".3~g", thickness: 12, outlinewidth: 0, tickfont: font },
  };
  const layout = {
    height: 110 + 24 * stack.modules.length,
    margin: { t: data.stacks.length > 1 ? 36 : 12, r: 8, b: 44, l: 8 },
    title: data.stacks.length > 1 ? { text: stack.name, font: { ...font, size: 14 }, x: 0 } : undefined,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font,
    xaxis: { title: { text: "layer" }, type: "category", automargin: true, showgrid: false, fixedrange: true },
    yaxis: { type: "category", autorange: "reversed", automargin: true, showgrid: false, fixedrange: true },
  };
  Plotly.react(place, [trace], layout, { responsive: true, displayModeBar: false }).then(() => {
    box.dataset.drawn = figure;
  });
}
