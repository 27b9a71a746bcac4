"use strict";
// The page of igpo_jax.serve. What a person or the model wrote reaches the document as text only (el, textBlock).
const by = (id) => document.getElementById(id);
let turns = [];        // the chat so far, as the API takes it
let order = null;      // the last answer's tokens, see `order` in docs/serve.md
let pins = new Map();  // position -> id of a token that is pinned
let texts = [];        // pinned texts: {text, start}
let running = null;    // the AbortController of the request that is under way

function tell(text) {
  by("message").hidden = !text;
  by("message").replaceChildren(text ? shown(text) : "");
}

function drawTurns(answer) {
  const all = answer === undefined ? turns : [...turns, {role: "assistant", content: answer}];
  by("turns").replaceChildren(...all.map((turn) =>
    el("div", {class: `turn ${turn.role}`}, el("span", {class: "soft"}, turn.role), textBlock(turn.content))));
}

// pieces: a text for each token, null where it is masked; given: the positions that were hints.
function drawCanvas(pieces, given) {
  by("canvas").replaceChildren(...pieces.map((piece, at) => {
    const special = piece !== null && /^<[a-z0-9]+>$/.test(piece);
    const name = `token${piece === null ? " masked" : ""}${special ? " special" : ""}${given.has(at) ? " hint" : ""}`;
    return el("button", {
      type: "button", class: name, "data-at": at, title: `token ${at}`, disabled: piece === null || !order,
      "aria-pressed": pins.has(at) ? "true" : "false", onclick: () => toggle(at),
    }, piece === null ? "░" : piece);
  }));
}

function draw() {
  const given = new Set();
  for (const [start, end] of order ? order.hints : []) for (let at = start; at < end; at++) given.add(at);
  if (order) drawCanvas(order.pieces, given);
  else by("canvas").replaceChildren();
  by("pinned").textContent = pins.size ? `${pins.size} pinned` : "";
  by("again").disabled = !!running || !turns.length;
  by("unpin").disabled = !pins.size;
  by("send").disabled = !!running;
  by("stop").disabled = !running;
  by("texts").replaceChildren(...texts.map((item, k) => el("button", {
    type: "button", title: "let it go", onclick: () => { texts.splice(k, 1); draw(); },
  }, `${item.text} @${item.start} ×`)));
}

function toggle(at) {
  if (!pins.delete(at)) pins.set(at, order.tokens[at]);
  draw();
}

// Neighbors in one hint.
function pinnedRuns() {
  const runs = [];
  for (const at of [...pins.keys()].sort((a, b) => a - b)) {
    const last = runs[runs.length - 1];
    if (last && last.start + last.tokens.length === at) last.tokens.push(pins.get(at));
    else runs.push({tokens: [pins.get(at)], start: at});
  }
  return runs;
}

function request() {
  const body = {
    messages: turns, stream: true, stream_options: {denoising: true}, order: true,
    hints: [...pinnedRuns(), ...texts],
  };
  for (const [id, name] of [["temperature", "temperature"], ["tokens", "max_tokens"], ["seed", "seed"]])
    if (by(id).value !== "") body[name] = Number(by(id).value);
  if (by("template").value) body.template = by("template").value;
  return body;
}

function headers() {
  const key = by("key").value;
  return {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice("data: ".length));
  }
}

async function ask() {
  tell("");
  const body = request();
  let answer = "";
  running = new AbortController();
  order = null;
  draw();
  drawTurns("");
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) {
      if (response.status === 401) by("key-label").hidden = false;
      throw new Error((await response.json()).error.message);
    }
    for await (const part of events(response)) {
      if (part.error) throw new Error(part.error.message);
      const choice = part.choices[0];
      answer += choice.delta.content || "";
      if (choice.canvas) drawCanvas(choice.canvas, new Set());
      if (choice.order) order = choice.order;
      drawTurns(answer);
    }
    if (!order) throw new Error("the answer broke off");
    turns.push({role: "assistant", content: answer});
    pins = new Map([...pins].filter(([at]) => at < order.tokens.length));
  } catch (error) {
    tell(error.name === "AbortError" ? "stopped" : error.message);
  }
  running = null;
  drawTurns();
  draw();
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = by("question").value;
  if (running || !question.trim()) return;
  if (turns.length && turns[turns.length - 1].role === "user") turns.pop();  // it was not answered
  turns.push({role: "user", content: question});
  pins = new Map();
  by("question").value = "";
  ask();
});
by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) by("ask").requestSubmit();
});
by("again").addEventListener("click", () => {
  if (turns.length && turns[turns.length - 1].role === "assistant") turns.pop();
  ask();
});
by("stop").addEventListener("click", () => running && running.abort());
by("unpin").addEventListener("click", () => { pins = new Map(); draw(); });
by("clear").addEventListener("click", () => {
  if (running) return;
  turns = []; texts = []; pins = new Map(); order = null;
  tell(""); drawTurns(); draw();
});
by("pin").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!by("pin-text").value) return;
  texts.push({text: by("pin-text").value, start: Number(by("pin-start").value)});
  by("pin-text").value = "";
  draw();
});
fetch("health").then((response) => response.json()).then((health) => {
  by("model").replaceChildren(shown(health.model));
  document.title = `${health.model} - igpo_jax`;
  by("state").textContent = `${health.working} at work, ${health.waiting} waiting`;
}).catch(() => tell("the server does not answer")).finally(() => {
  draw();
  document.documentElement.dataset.ready = "true";
});
