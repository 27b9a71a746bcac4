"use strict";
// Curves of all runs over each other, drawn by uPlot.
const SHARE = [0, 1];
const CHARTS = [
  {title: "Held-out accuracy", evals: true, range: SHARE, x: "step (SFT, then RL)"},
  {title: "SFT loss (nats per token)", stage: "sft", names: ["sft/loss"]},
  {title: "Reward", stage: "rl", names: ["rl/reward", "rl/reward_after"]},
  {title: "Groups all wrong (share)", stage: "rl", names: ["rl/all_wrong_before", "rl/all_wrong_after"], range: SHARE},
  {title: "Second tries: right, answer shown (share)", stage: "rl", names: ["rl/extra_correct", "rl/answer_shown"], range: SHARE},
  {title: "RL loss", stage: "rl", names: ["rl/loss"]},
  {title: "KL to the reference (nats)", stage: "rl", names: ["rl/kl"]},
  {title: "Entropy (nats)", stage: "rl", names: ["rl/entropy", "rl/hint_entropy", "rl/entropy_floor"]},
  {title: "Length (tokens)", stage: "rl", names: ["rl/length"]},
  {title: "Seconds per RL step", stage: "rl", names: ["time/step_seconds"]},
  {title: "Sampled tokens per second", stage: "rl", names: ["time/tokens_per_second"]},
];
const plots = [];

function runningMean(values, size) {
  if (size <= 1) return values;
  let sum = 0, count = 0;
  return values.map((value, k) => {
    if (value !== null) { sum += value; count += 1; }
    const left = k >= size ? values[k - size] : null;
    if (left !== null) { sum -= left; count -= 1; }
    return count ? sum / count : null;
  });
}

// Tables [x, y...] and how each y is drawn, for one chart.
function tablesOf(chart, smoothing, bands) {
  const tables = [], series = [];
  const add = (x, ys, options) => { tables.push([x, ...ys]); series.push(...options); };
  const banded = new Set(bands ? DATA.bands.flatMap((band) => band.runs) : []);
  const names = (run) => chart.evals ? Object.keys(run.evals) : chart.names;
  const curve = (run, name) => {
    if (!chart.evals) return (run.curves[chart.stage] || {})[name];
    const points = run.evals[name];
    return points && {x: points.map((p) => p.x), y: points.map((p) => p.accuracy), points};
  };
  const label = (who, name) => (DATA.runs.length > 1 ? `${who} ` : "") + name.replace(/^rl\/|^sft\/|^time\//, "");
  DATA.runs.forEach((run, k) => names(run).forEach((name, n) => {
    const found = curve(run, name);
    if (!found || banded.has(k)) return;
    const style = {stroke: PALETTE[(DATA.runs.length > 1 ? k : n) % PALETTE.length], width: 1.5,
      dash: DATA.runs.length > 1 && n ? [6, 3 * n] : undefined, label: shown(label(run.name, name)),
      points: {show: Boolean(chart.evals) || found.x.length < 3, size: 6}, spanGaps: true};
    const y = chart.evals ? found.y : runningMean(found.y, smoothing);
    if (!chart.evals) return add(found.x, [y], [style]);
    const edge = (end) => ({...style, label: `${style.label} ${end}`, width: 0, points: {show: false}, edge: end});
    add(found.x, [y, found.points.map((p) => p.high), found.points.map((p) => p.low)],
        [style, edge("high"), edge("low")]);
  }));
  if (bands) DATA.bands.forEach((band, b) => names(DATA.runs[band.runs[0]]).forEach((name, n) => {
    const found = band.runs.map((k) => curve(DATA.runs[k], name)).filter(Boolean);
    if (found.length < 2) return;
    const [x, ...ys] = uPlot.join(found.map((c) => [c.x, chart.evals ? c.y : runningMean(c.y, smoothing)]));
    const over = (f) => x.map((_, k) => { const v = ys.map((y) => y[k]).filter((y) => y !== null && y !== undefined); return v.length ? f(v) : null; });
    const style = {stroke: PALETTE[(b + n) % PALETTE.length], width: 2, label: shown(label(band.name, name)), spanGaps: true,
      points: {show: Boolean(chart.evals), size: 6}};
    const edge = (end) => ({...style, label: `${style.label} ${end}`, width: 0, points: {show: false}, edge: end});
    add(x, [over((v) => v.reduce((a, c) => a + c) / v.length), over((v) => Math.max(...v)), over((v) => Math.min(...v))],
        [style, edge("high"), edge("low")]);
  }));
  return {tables, series};
}

function drawChart(chart, card, smoothing, bands) {
  const {tables, series} = tablesOf(chart, smoothing, bands);
  if (!tables.length) return false;
  const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
  const fills = [];
  series.forEach((s, k) => { if (s.edge === "high") fills.push({series: [k + 1, k + 2], fill: `${s.stroke}26`}); });
  const axis = {stroke: () => cssColor("--soft"), grid: {stroke: () => cssColor("--line"), width: 1}, ticks: {stroke: () => cssColor("--line")}};
  const width = () => Math.max(200, card.clientWidth - 26);
  const plot = new uPlot({
    width: width(), height: 210,
    scales: {x: {time: false}, ...(chart.range ? {y: {range: chart.range}} : {})},
    axes: [{...axis, label: chart.x || `${chart.stage.toUpperCase()} step`, labelSize: 18, size: 34}, {...axis, size: 52}],
    series: [{label: "step"}, ...series.map((s) => ({...s, value: (_, v) => number(v, 4)}))],
    bands: fills, cursor: {sync: {key: chart.evals ? "run" : chart.stage}},
  }, data, card);
  // The edges of an interval need no line in the legend.
  card.querySelectorAll(".u-legend .u-series").forEach((row, k) => { if (k && series[k - 1].edge) row.style.display = "none"; });
  plots.push({plot, width});
  return true;
}

function drawCurves() {
  const place = body("curves");
  const smoothing = el("input", {type: "range", min: 1, max: 100, value: 1, id: "smoothing"});
  const told = el("output", {id: "smoothing-told"});
  const bands = el("input", {type: "checkbox", id: "bands", checked: DATA.bands.length > 0});
  const every = new Map();
  for (const run of DATA.runs) for (const [stage, curves] of Object.entries(run.curves)) {
    for (const name of Object.keys(curves)) every.set(`${stage} ${name}`, {stage, name});
  }
  const more = el("select", {id: "more-metrics"}, option("", "another metric…"),
    [...every.keys()].sort().map((key) => option(key, key)));
  const charts = el("div", {id: "charts"});
  const added = [];
  const redraw = () => {
    while (plots.length) plots.pop().plot.destroy();
    charts.replaceChildren();
    const size = Number(smoothing.value);
    told.textContent = size > 1 ? `mean of the last ${size} points` : "none";
    for (const chart of [...added, ...CHARTS]) {
      const card = el("div", {class: "card chart"}, el("h3", {}, chart.title));
      charts.append(card);
      if (!drawChart(chart, card, size, bands.checked)) card.remove();
    }
    if (!charts.children.length) charts.append(el("p", {class: "soft"}, "No step was logged yet."));
  };
  smoothing.addEventListener("input", redraw);
  bands.addEventListener("change", redraw);
  more.addEventListener("change", () => {
    const found = every.get(more.value);
    if (found) added.unshift({title: more.value, stage: found.stage, names: [found.name]});
    more.value = "";
    redraw();
  });
  const means = Math.max(1, ...DATA.runs.flatMap((run) => Object.values(run.curves)).flatMap((c) => Object.values(c)).map((c) => c.mean_of));
  place.append(
    el("div", {class: "row"}, el("label", {}, "smoothing", smoothing), told,
      DATA.bands.length ? el("label", {}, bands, "runs that differ by seed as one: mean, from least to greatest") : null, more),
    el("p", {class: "soft"}, "Drag to zoom, double-click to go back, click a name to hide its curve." +
      (means > 1 ? ` A point is the mean of up to ${means} steps.` : "")),
    charts);
  redraw();
  new ResizeObserver(() => plots.forEach(({plot, width}) => {
    if (plot.width !== width()) plot.setSize({width: width(), height: 210});
  })).observe(charts);
  document.addEventListener("theme", () => plots.forEach(({plot}) => plot.redraw()));
}
