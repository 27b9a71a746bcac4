"use strict";
// What the other scripts share. Text from a run reaches the document as text only: through
// textContent, never as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);

// An element with attributes, listeners ("onclick") and children; null children are left out.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child.nodeType ? child : shown(String(child)));
  }
  return node;
}

const SIGNS = {"\n": "⏎\n", "\t": "⇥", "\0": "␀", "\x1b": "␛"};

// Control characters, direction marks and half characters as signs that can be seen.
function shown(text) {
  return text
    .replace(/[\uD800-\uDBFF](?![\uDC00-\uDFFF])|(?<![\uD800-\uDBFF])[\uDC00-\uDFFF]/g, "\uFFFD")
    .replace(/[\p{Cc}\p{Zl}\p{Zp}]|(?!\u200D)\p{Cf}/gu, (c) =>
      SIGNS[c] || `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// A text of a run's as a block that keeps its line ends.
function textBlock(text) {
  return el("div", {class: "text", dir: "auto"}, text === null || text === undefined ? "-" : text);
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "-";
  if (Math.abs(value) < 1e-12) return "0";
  return Number.isInteger(value) ? String(value) : Number(value).toPrecision(digits);
}

function option(value, label, chosen) {
  return el("option", {value, selected: value === chosen}, label);
}

function body(id) {
  return document.querySelector(`#${id} .body`);
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Distinct on white and on black, and to most eyes (Okabe and Ito's, a little darker).
const PALETTE = ["#2f7fd1", "#d95f02", "#1b9e77", "#c2419b", "#b8860b", "#7570b3", "#17a2b8", "#8c564b"];
