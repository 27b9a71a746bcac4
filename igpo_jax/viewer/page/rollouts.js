"use strict";
// The rollout viewer: a step, a group, a completion; its canvas through the denoising steps.
const FILTERS = {
  all: ["all groups", () => true],
  wrong: ["all wrong without hints", (rows) => !rows.some((r) => r.phase === "own" && r.correct)],
  inserted: ["something inserted", (rows) => rows.some((r) => r.used === "inserted")],
  shown: ["answer shown by a hint", (rows) => rows.some((r) => r.answer_shown)],
  unparseable: ["an answer unparseable", (rows) => rows.some((r) => r.status !== "ok")],
  longest: ["the 20 longest", null],
};
const COLORS = {
  commit: ["commit step", (row, k) => row.commit_step[k] < 0 ? null : mix("#4f8ef7", "#e4572e", row.commit_step[k] / Math.max(1, lastStep(row)))],
  confidence: ["confidence", (row, k) => row.commit_logp && row.commit_step[k] >= 0 ? mix("#e4572e", "#2a9d5c", Math.exp(row.commit_logp[k])) : null],
  entropy: ["entropy", (row, k) => statistic(row, "entropy", k, (v) => mix("#2a9d5c", "#e4572e", Math.min(1, v / 2)))],
  advantage: ["advantage", (row, k) => row.advantage === null || row.advantage === 0 ? null : fade(row.advantage > 0 ? "#2a9d5c" : "#d7263d", Math.min(1, Math.abs(row.advantage)) * (kept(row, k) ? 0.6 : 0.15))],
  ratio: ["ratio after the step", (row, k) => statistic(row, "ratio", k, (v) => fade(v > 1 ? "#2a9d5c" : "#d7263d", Math.min(0.7, 3 * Math.abs(Math.log(v)))))],
  none: ["none", () => null],
};
const SCALES = {commit: ["early", "#4f8ef7", "#e4572e", "late"], confidence: ["p = 0", "#e4572e", "#2a9d5c", "1"],
  entropy: ["0 nats", "#2a9d5c", "#e4572e", "2 or more"], advantage: ["negative", "#d7263d", "#2a9d5c", "positive"],
  ratio: ["less likely", "#d7263d", "#2a9d5c", "more likely"]};
const view = {run: 0, filter: "all", search: "", step: null, group: null, row: null, at: 0, color: "commit", timer: null};

const hex = (c, k) => parseInt(c.slice(1 + 2 * k, 3 + 2 * k), 16);
const mix = (a, b, t) => `rgba(${[0, 1, 2].map((k) => Math.round(hex(a, k) + (hex(b, k) - hex(a, k)) * Math.min(1, Math.max(0, t)))).join(",")},0.42)`;
const fade = (c, alpha) => `rgba(${[0, 1, 2].map((k) => hex(c, k)).join(",")},${alpha.toFixed(3)})`;
const lastStep = (row) => Math.max(-1, ...row.commit_step);
const isHint = (row, k) => row.hints.some(([begin, end]) => begin <= k && k < end);
const kept = (row, k) => !row.token_stats || row.token_stats.kept[k];
function statistic(row, name, k, color) {
  const value = row.token_stats && row.token_stats[name][k];
  return value === null || value === undefined ? null : color(value);
}

// {step, group, rows} of everything that the filter lets through, in order.
function matches() {
  const groups = new Map();
  for (const row of DATA.runs[view.run].samples) {
    const key = `${row.step} ${row.group}`;
    if (!groups.has(key)) groups.set(key, {step: row.step, group: row.group, rows: []});
    groups.get(key).rows.push(row);
  }
  let found = [...groups.values()];
  if (view.search) {
    const word = view.search.toLowerCase();
    found = found.filter(({rows}) => rows.some((r) => [r.id, r.prompt, r.completion].some((t) => String(t).toLowerCase().includes(word))));
  }
  const [, test] = FILTERS[view.filter];
  if (test) found = found.filter(({rows}) => test(rows));
  else {
    const longest = (rows) => Math.max(...rows.map((r) => (r.completion || "").length));
    found = found.sort((a, b) => longest(b.rows) - longest(a.rows)).slice(0, 20);
  }
  return found.sort((a, b) => a.step - b.step || a.group - b.group);
}

// A token as a span. `at`: the denoising step after which the canvas is drawn; null: finished.
function tokenSpan(row, k, at, color, block) {
  const step = row.commit_step[k], hint = isHint(row, k);
  const masked = at !== null && !hint && step > at;
  const piece = row.pieces[k];
  const names = ["token"];
  if (hint) names.push("hint");
  if (masked) names.push("masked");
  else if (at !== null && step === at && !hint) names.push("new");
  if (/^<[^>]+>$/.test(piece) && !masked) names.push("special");
  if (row.token_stats && hint && !row.token_stats.kept[k]) names.push("dropped");
  if (block && k % block === block - 1 && k < row.pieces.length - 1) names.push("block");
  const about = [`position ${k}`, row.tokens ? `id ${row.tokens[k]}` : "", hint ? "hint" : `step ${step}`];
  if (row.commit_logp && !hint && step >= 0) about.push(`p ${Math.exp(row.commit_logp[k]).toFixed(3)}`);
  for (const name of ["entropy", "ratio"]) if (row.token_stats && row.token_stats[name][k] !== null) about.push(`${name} ${number(row.token_stats[name][k])}`);
  if (row.token_stats && hint) about.push(row.token_stats.kept[k] ? "kept in the loss" : "dropped by the filter");
  const span = el("span", {class: names.join(" "), title: about.filter(Boolean).join(", "), "data-k": k}, masked ? "░" : piece);
  const paint = masked ? null : color(row, k);
  if (paint) span.style.background = paint;
  return span;
}

function tokens(row, at, color, block) {
  if (!row.pieces) return textBlock(row.completion);
  return el("div", {class: "tokens", dir: "ltr"}, row.pieces.map((_, k) => tokenSpan(row, k, at, color, block)));
}

// A finished completion on little room: what follows its end is counted.
function inShort(row) {
  const line = tokens(row, null, () => null, 0);
  let end = row.pieces ? row.pieces.length : 0;
  while (end > 1 && row.pieces[end - 1] === row.pieces[end - 2] && /^<[^>]+>$/.test(row.pieces[end - 1]) && !isHint(row, end - 1)) end -= 1;
  const left = row.pieces ? row.pieces.length - end : 0;
  if (left > 0) {
    while (line.children.length > end) line.lastChild.remove();
    line.append(el("span", {class: "soft"}, ` ×${left + 1}`));
  }
  return line;
}

function verdictLine(row) {
  const parts = [el("span", {class: row.correct ? "good" : "bad"}, row.correct ? "right" : "wrong")];
  if (row.reason) parts.push(` ${row.reason}`);
  parts.push(` · reward ${number(row.reward)}`);
  if (row.advantage !== null && row.advantage !== undefined) parts.push(` · advantage ${number(row.advantage)}`);
  return el("div", {}, parts.map((p) => p.nodeType ? p : el("span", {}, p)));
}

function fate(row) {
  const words = `${row.phase} ${row.number}: ${row.used}`;
  if (row.partner === null || row.partner === undefined) return words;
  return words + (row.used === "inserted" ? ` in the place of own ${row.partner}` : ` by ${row.partner} of the second try`);
}

function drawRollouts() {
  const place = body("rollouts");
  const runs = el("select", {id: "run"}, DATA.runs.map((run, k) => option(String(k), run.name, "0")));
  const filter = el("select", {id: "filter"}, Object.entries(FILTERS).map(([key, [label]]) => option(key, label, "all")));
  const search = el("input", {id: "search", type: "search", placeholder: "find text", size: 12});
  const steps = el("input", {type: "range", id: "step", min: 0, max: 0, value: 0, "aria-label": "RL step"});
  const stepTold = el("output", {id: "step-told"}), found = el("span", {class: "soft", id: "found"});
  const chips = el("div", {class: "chips", id: "groups"}), detail = el("div", {id: "detail"});
  let all = [], distinct = [];

  function select(change) {
    Object.assign(view, change);
    all = matches();
    distinct = [...new Set(all.map((m) => m.step))];
    if (!distinct.includes(view.step)) view.step = distinct.length ? distinct[distinct.length - 1] : null;
    const here = all.filter((m) => m.step === view.step);
    if (!here.some((m) => m.group === view.group)) view.group = here.length ? here[0].group : null;
    const rows = (here.find((m) => m.group === view.group) || {rows: []}).rows;
    if (!rows.includes(view.row)) {
      view.row = rows.find((r) => r.used === "inserted") || rows[0] || null;
      view.at = view.row ? lastStep(view.row) : 0;
    }
    steps.max = Math.max(0, distinct.length - 1);
    steps.value = Math.max(0, distinct.indexOf(view.step));
    steps.disabled = distinct.length < 2;
    stepTold.textContent = view.step === null ? "no step" : `RL step ${view.step}`;
    found.textContent = `${all.length} group${all.length === 1 ? "" : "s"} in ${distinct.length} step${distinct.length === 1 ? "" : "s"}`;
    chips.replaceChildren(...here.map((m) => {
      const own = m.rows.filter((r) => r.phase === "own"), right = own.filter((r) => r.correct).length;
      const inserted = m.rows.filter((r) => r.used === "inserted").length;
      return el("button", {"aria-pressed": String(m.group === view.group), "data-group": m.group, title: "right of the own completions that are here",
        onclick: () => select({group: m.group, row: null})}, `group ${m.group}: ${right}/${own.length}${inserted ? ` +${inserted}` : ""}`);
    }));
    drawDetail(rows);
  }

  function drawDetail(rows) {
    detail.replaceChildren();
    const row = view.row;
    if (!row) {
      detail.append(el("p", {class: "soft", id: "nothing"}, DATA.runs[view.run].samples.length
        ? "No group fits this filter." : "There is no row in samples.jsonl yet."));
      return;
    }
    const own = rows.filter((r) => r.phase === "own"), second = rows.filter((r) => r.phase !== "own");
    const canvas = el("div", {id: "canvas"}), block = DATA.runs[view.run].block_length;
    const last = lastStep(row);
    const slider = el("input", {type: "range", id: "denoise", min: -1, max: last, value: view.at, "aria-label": "denoising step"});
    const told = el("output", {id: "denoise-told"});
    const play = el("button", {id: "play", title: "play (space)"}, "▶ play");
    const color = el("select", {id: "color"}, Object.entries(COLORS).map(([key, [label]]) => option(key, label, view.color)));
    const scale = el("span", {class: "soft"});
    const draw = () => {
      canvas.replaceChildren(tokens(row, view.at, COLORS[view.color][1], block));
      slider.value = view.at;
      told.textContent = view.at < 0 ? "hints only" : `denoising step ${view.at} of ${last}`;
      const ends = SCALES[view.color];
      scale.replaceChildren();
      if (ends) {
        const bar = el("span", {class: "scale"});
        bar.style.background = `linear-gradient(90deg, ${ends[1]}, ${ends[2]})`;
        scale.append(`${ends[0]} `, bar, ` ${ends[3]}`);
      }
      const lacks = {confidence: !row.commit_logp, entropy: !row.token_stats, ratio: !row.token_stats, advantage: row.advantage === null}[view.color];
      if (lacks) scale.append(view.color === "advantage" ? " (not learned from)" : " (not logged for this completion: log.token_stats)");
    };
    const stop = () => { clearInterval(view.timer); view.timer = null; play.textContent = "▶ play"; };
    view.move = (by) => { view.at = Math.min(last, Math.max(-1, view.at + by)); draw(); };
    view.play = () => {
      if (view.timer) return stop();
      if (view.at >= last) view.at = -2;
      play.textContent = "❚❚ stop";
      view.timer = setInterval(() => { view.move(1); if (view.at >= last) stop(); }, Math.max(40, Math.min(300, 6000 / (last + 2))));
      view.move(1);
    };
    view.recolor = () => { const keys = Object.keys(COLORS); view.color = keys[(keys.indexOf(view.color) + 1) % keys.length]; color.value = view.color; draw(); };
    if (view.timer) stop();
    slider.addEventListener("input", () => { view.at = Number(slider.value); draw(); });
    play.addEventListener("click", view.play);
    color.addEventListener("change", () => { view.color = color.value; draw(); });
    const facts = [["question", row.prompt], ["gold answer", row.answer], ["answer found", row.extracted]];
    if (row.parts && Object.keys(row.parts).length > 1) facts.push(["reward parts", Object.entries(row.parts).map(([n, v]) => `${n} ${number(v)}`).join(", ")]);
    const button = (r) => el("button", {class: "card completion", role: "option", "aria-selected": String(r === row), "data-place": `${r.phase} ${r.number}`,
      onclick: () => select({row: r, at: lastStep(r)})},
      el("div", {class: "soft"}, fate(r)), verdictLine(r), inShort(r));
    detail.append(
      el("div", {class: "card", id: "chosen"},
        el("div", {class: "row"}, el("strong", {}, fate(row)), el("span", {class: "soft"}, `id ${row.id}`)),
        el("div", {class: "scroll"}, el("table", {}, facts.map(([name, text]) => el("tr", {}, el("th", {}, name), el("td", {}, textBlock(text)))))),
        verdictLine(row),
        row.pieces ? el("div", {class: "row"}, play, slider, told, el("label", {}, "colour", color), scale) : el("p", {class: "soft"}, "This row is of an older version, without tokens: see docs/samples.md."),
        canvas,
        row.pieces ? el("p", {class: "soft"}, "Yellow: hints. Grey: still masked. Underlined: filled in by this step. Struck through: a hint that the entropy filter drops from the loss. Dashed lines: blocks.") : null),
      el("div", {class: "pair"},
        el("div", {id: "own"}, el("h3", {}, `The policy's own tries (${own.length} here)`), own.map(button)),
        el("div", {id: "second"}, el("h3", {}, `Second try (${second.length} here)`), second.length ? second.map(button) : el("p", {class: "soft"}, "none: not all were wrong, or not in this file"))));
    if (row.pieces) draw(); else canvas.append(textBlock(row.completion));
    view.rows = [...own, ...second];
  }

  runs.addEventListener("change", () => select({run: Number(runs.value), step: null, group: null, row: null}));
  filter.addEventListener("change", () => select({filter: filter.value}));
  search.addEventListener("input", () => select({search: search.value}));
  steps.addEventListener("input", () => select({step: distinct[Number(steps.value)], row: null}));
  view.nextStep = (by) => { const k = distinct.indexOf(view.step) + by; if (distinct[k] !== undefined) select({step: distinct[k], row: null}); };
  view.nextGroup = (by) => {
    const k = all.findIndex((m) => m.step === view.step && m.group === view.group) + by;
    if (all[k]) select({step: all[k].step, group: all[k].group, row: null});
  };
  view.nextRow = (by) => { const k = view.rows.indexOf(view.row) + by; if (view.rows[k]) select({row: view.rows[k], at: lastStep(view.rows[k])}); };
  view.nextFilter = () => { const keys = Object.keys(FILTERS); filter.value = keys[(keys.indexOf(view.filter) + 1) % keys.length]; select({filter: filter.value}); };
  place.append(el("div", {class: "row"}, DATA.runs.length > 1 ? el("label", {}, "run", runs) : null, el("label", {}, "show", filter), search, found),
    el("div", {class: "row"}, steps, stepTold), chips, detail);
  select({});
}
