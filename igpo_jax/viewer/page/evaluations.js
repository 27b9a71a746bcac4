"use strict";
// Evaluation items: right, wrong, changed between two evaluations of one run or of two.
const WANTED = {
  changed: ["changed", (a, b) => a && b && a.correct !== b.correct],
  better: ["wrong, then right", (a, b) => a && b && !a.correct && b.correct],
  worse: ["right, then wrong", (a, b) => a && b && a.correct && !b.correct],
  right: ["right (second)", (a, b) => b && b.correct],
  wrong: ["wrong (second)", (a, b) => b && !b.correct],
  all: ["all", () => true],
};
const ITEMS_AT_ONCE = 50;

function drawEvaluations() {
  const place = body("evaluations");
  // Every evaluation of every run: benchmark -> [{name, tries by item}]
  const benches = new Map();
  for (const run of DATA.runs) for (const [bench, {labels, items}] of Object.entries(run.items)) {
    if (!benches.has(bench)) benches.set(bench, {items: new Map(), columns: []});
    const here = benches.get(bench);
    labels.forEach((label, k) => {
      const column = new Map(items.map((item) => [`${item.id} #${item.sample}`, item.tries[k]]));
      here.columns.push({name: (DATA.runs.length > 1 ? `${run.name}: ` : "") + label, column});
    });
    for (const item of items) here.items.set(`${item.id} #${item.sample}`, item);
  }
  if (!benches.size) return place.append(el("p", {class: "soft"}, "No evaluation has rows here."));
  const state = {bench: benches.keys().next().value, first: 0, second: 0, wanted: "changed", shown: ITEMS_AT_ONCE};
  const controls = el("div", {class: "row"}), told = el("p", {class: "soft", id: "items-found"}), list = el("div", {id: "items"});

  function draw() {
    const {items, columns} = benches.get(state.bench);
    const choose = (id, key) => el("select", {id, onchange: (e) => { state[key] = Number(e.target.value); state.shown = ITEMS_AT_ONCE; draw(); }},
      columns.map((c, k) => option(String(k), c.name, String(state[key]))));
    controls.replaceChildren(
      el("label", {}, "benchmark", el("select", {id: "bench", onchange: (e) => { state.bench = e.target.value; begin(); }}, [...benches.keys()].map((b) => option(b, b, state.bench)))),
      el("label", {}, "from", choose("from", "first")), el("label", {}, "to", choose("to", "second")),
      el("label", {}, "show", el("select", {id: "wanted", onchange: (e) => { state.wanted = e.target.value; state.shown = ITEMS_AT_ONCE; draw(); }},
        Object.entries(WANTED).map(([key, [label]]) => option(key, label, state.wanted)))));
    const a = columns[state.first].column, b = columns[state.second].column;
    const fits = [...items.entries()].filter(([key]) => WANTED[state.wanted][1](a.get(key), b.get(key)));
    const better = [...items.keys()].filter((key) => WANTED.better[1](a.get(key), b.get(key))).length;
    const worse = [...items.keys()].filter((key) => WANTED.worse[1](a.get(key), b.get(key))).length;
    told.textContent = `${fits.length} of ${items.size} items; ${better} became right, ${worse} became wrong`;
    list.replaceChildren(...fits.slice(0, state.shown).map(([key, item]) => el("details", {class: "card"},
      el("summary", {}, mark(a.get(key)), " → ", mark(b.get(key)), ` ${item.question === null || item.question === undefined ? key : item.question}`.slice(0, 160)),
      el("h3", {}, "question"), textBlock(item.question), el("h3", {}, "gold answer"), textBlock(item.answer),
      el("div", {class: "pair"}, side(columns[state.first].name, a.get(key)), side(columns[state.second].name, b.get(key))))));
    if (fits.length > state.shown) list.append(el("button", {onclick: () => { state.shown += ITEMS_AT_ONCE; draw(); }}, `${fits.length - state.shown} more`));
  }
  const mark = (t) => el("span", {class: t ? (t.correct ? "good" : "bad") : "soft"}, t ? (t.correct ? "right" : "wrong") : "none");
  const side = (name, t) => el("div", {}, el("h3", {}, name), t ? [mark(t), el("div", {class: "soft"}, "answer found"), textBlock(t.extracted), el("div", {class: "soft"}, "completion"), textBlock(t.completion)] : el("p", {class: "soft"}, "not evaluated"));
  function begin() {
    const {columns} = benches.get(state.bench);
    state.second = columns.length - 1;
    state.first = Math.max(0, columns.length - 2);
    draw();
  }
  place.append(controls, told, list);
  begin();
}
