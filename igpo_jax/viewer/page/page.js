"use strict";
// The run's card and table, the theme, the keys.
const KEYS = [["← →", "denoising step"], ["space", "play or stop"], ["j k", "next, previous completion"], ["n p", "next, previous group"],
  ["] [", "next, previous RL step"], ["c", "colour"], ["f", "filter"], ["t", "theme"], ["?", "this list"]];

function interval(result) {
  if (result.low === null || result.low === undefined) return "";
  return `${number(result.low)} to ${number(result.high)}`;
}

function drawOverview() {
  const place = body("overview");
  const many = DATA.runs.length > 1;
  const accuracy = DATA.runs.flatMap((run) => run.summary.eval.map((r) => el("tr", {}, many ? el("td", {}, run.name) : null, el("td", {}, r.benchmark), el("td", {}, r.when + (r.unlike ? ` (unlike the others: ${r.unlike})` : "")),
    el("td", {class: "number"}, number(r.accuracy)), el("td", {class: "number"}, interval(r)), el("td", {class: "number"}, number(r.n)))));
  if (accuracy.length) place.append(el("div", {class: "scroll"}, el("table", {id: "headline"},
    el("tr", {}, (many ? ["run"] : []).concat(["benchmark", "when", "accuracy", "95% interval", "problems"]).map((t) => el("th", {}, t))), accuracy)));
  const means = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.summary.rl)))];
  if (means.length) place.append(el("h3", {}, "RL, means over all steps"), el("div", {class: "scroll"}, el("table", {},
    el("tr", {}, many ? el("th", {}, "run") : null, means.map((name) => el("th", {}, name.replaceAll("_", " ")))),
    DATA.runs.map((run) => el("tr", {}, many ? el("td", {}, run.name) : null, means.map((name) => el("td", {class: "number"}, number(run.summary.rl[name]))))))));
  for (const run of DATA.runs) {
    const facts = [["folder", run.workdir], ["command", run.resolved.command], ["devices", run.resolved.devices],
      ["versions", run.resolved.versions && Object.entries(run.resolved.versions).map(([n, v]) => `${n} ${v}`).join(", ")], ["seed", run.seed]];
    place.append(el("div", {class: "card run"}, el("h3", {}, run.name),
      el("div", {class: "scroll"}, el("table", {}, facts.filter(([, v]) => v !== null && v !== undefined).map(([name, v]) => el("tr", {}, el("th", {}, name), el("td", {}, textBlock(String(v))))))),
      run.notes.map((note) => el("p", {class: "soft note"}, note)),
      el("details", {}, el("summary", {}, `${run.config.length} options differ from the defaults`),
        el("div", {class: "scroll"}, el("table", {}, el("tr", {}, ["option", "here", "default"].map((t) => el("th", {}, t))),
          run.config.map(([name, value, usual]) => el("tr", {}, el("td", {}, el("code", {}, name)), el("td", {}, el("code", {}, JSON.stringify(value))), el("td", {class: "soft"}, el("code", {}, usual === undefined ? "-" : JSON.stringify(usual))))))))));
  }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.dispatchEvent(new Event("theme"));
}

function nextTheme() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(dark ? "light" : "dark");
}

function toggleHelp() {
  const help = document.getElementById("help");
  help.hidden = !help.hidden;
  document.getElementById("help-button").setAttribute("aria-expanded", String(!help.hidden));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const tag = event.target.tagName;
  if (tag === "INPUT" || tag === "SELECT" || tag === "TEXTAREA") return;
  if (event.key === " " && (tag === "BUTTON" || tag === "SUMMARY" || tag === "A")) return;
  const actions = {ArrowLeft: () => view.move && view.move(-1), ArrowRight: () => view.move && view.move(1), " ": () => view.play && view.play(),
    j: () => view.nextRow(1), k: () => view.nextRow(-1), n: () => view.nextGroup(1), p: () => view.nextGroup(-1),
    "]": () => view.nextStep(1), "[": () => view.nextStep(-1), c: () => view.recolor && view.recolor(), f: () => view.nextFilter(), t: nextTheme, "?": toggleHelp};
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

document.getElementById("help").append(el("div", {class: "card"}, el("table", {}, KEYS.map(([key, what]) => el("tr", {}, el("th", {}, el("code", {}, key)), el("td", {}, what))))));
document.getElementById("theme").addEventListener("click", nextTheme);
document.getElementById("help-button").addEventListener("click", toggleHelp);
document.addEventListener("keydown", onKey);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));
drawRollouts();
if (document.documentElement.dataset.section !== "rollouts") {
  drawOverview();
  drawEvaluations();
  drawCurves();
}
document.documentElement.dataset.ready = "true";
