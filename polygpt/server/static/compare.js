// Two models, one prompt: both texts side by side, and where they first differ.

import { tokenize } from "./api.js";
import { $, h } from "./dom.js";
import { chosenSeed, completionBody } from "./requests.js";
import { Sequence, write } from "./sequence.js";
import { state, subscribe, update, visit } from "./state.js";
import { Task, alertLine } from "./task.js";
import { label } from "./tokens.js";
import { writeFragment } from "./url.js";

const root = $("#view-compare");
const prompt = h("textarea", { class: "paper", rows: 4, "aria-label": "Prompt for both models", spellcheck: "false", placeholder: "One prompt for both models…" });
const pickers = { model: h("select", { "aria-label": "First model" }), other: h("select", { "aria-label": "Second model" }) };
const go = h("button", { class: "primary", onclick: () => compare() }, "Compare ", h("kbd", {}, "Ctrl ↵"));
const stop = h("button", { hidden: true, onclick: () => task.stop() }, "Stop ", h("kbd", {}, "Esc"));
const problem = h("p", { class: "problem", role: "alert", hidden: true });
const note = h("p", { class: "help" });
const verdict = h("p", { class: "verdict", role: "status", hidden: true });
const columns = h("div", { class: "columns" });
root.append(prompt, h("div", { class: "actions" }, pickers.model, h("span", { class: "versus" }, "and"), pickers.other, go, stop), note, problem, verdict, columns);

let pair = [];

export const task = new Task({
  show(busy) {
    go.hidden = busy;
    stop.hidden = !busy;
  },
  fail: alertLine(problem),
});

/** The place of the first difference of two texts, in tokens of each; null if one is the other's beginning. */
export function firstDifference(a, b) {
  const length = Math.min(a.text.length, b.text.length);
  let at = 0;
  while (at < length && a.text[at] === b.text[at]) at++;
  if (at === length) return null;
  return { characters: at, tokens: [a, b].map((sequence) => tokenAt(sequence.view.spans, at)) };
}

function tokenAt(spans, character) {
  let end = 0;
  return spans.findIndex((span) => (end += span.textContent.length) > character);
}

function judge() {
  const [a, b] = pair;
  for (const sequence of pair) sequence.element.querySelector(".differs")?.classList.remove("differs");
  if (!a.text || !b.text) return; // nothing to compare, as after an error
  const found = firstDifference(a, b);
  verdict.hidden = false;
  if (!found) {
    verdict.textContent = a.text === b.text ? "Both wrote the same text." : "They agree as far as the shorter one goes.";
    return;
  }
  const [first, second] = found.tokens.map((index, k) => {
    pair[k].view.spans[index].classList.add("differs");
    return label(pair[k].view.tokens[index]);
  });
  const agreed = found.tokens[0];
  const where = agreed ? `They agree on the first ${agreed === 1 ? "token" : `${agreed} tokens`}, then differ` : "They differ from the first token on";
  verdict.textContent = `${where}: “${first}” and “${second}”.`;
}

function compare() {
  return task.run(async (signal) => {
    const seed = chosenSeed();
    const bodies = [state.model, state.other].map((model) => completionBody(prompt.value, { model, n: 1, seed }));
    pair = bodies.map(({ model }) => {
      let ids;
      return new Sequence({ model, promptIds: () => (ids ??= tokenize({ model, prompt: bodies[0].prompt })), actions: [["Look inside", look]], name: model });
    });
    verdict.hidden = true;
    columns.replaceChildren(...pair.map((sequence) => h("section", { class: "column" }, h("h2", {}, sequence.model), sequence.element)));
    writeFragment();
    try {
      await Promise.all(pair.map((sequence, k) => write("/v1/completions", bodies[k], [sequence], signal)));
    } finally {
      judge();
    }
  });
}

async function look(sequence) {
  visit.subject = { model: sequence.model, ids: await sequence.allIds() };
  update({ view: "inspect" });
}

export const submit = () => !task.busy && compare();

export function serverKnown() {
  const names = visit.server.models.map((model) => model.name);
  for (const [field, picker] of Object.entries(pickers)) {
    picker.replaceChildren(...names.map((name) => h("option", {}, name)));
    picker.value = state[field];
  }
  note.textContent = names.length > 1 ? "The same settings and seed for both." : "This server has one model. Start it with two to compare them: polygpt serve A B";
}

export function start() {
  prompt.value = state.text;
  prompt.addEventListener("input", () => update({ text: prompt.value }));
  for (const [field, picker] of Object.entries(pickers)) picker.addEventListener("change", () => update({ [field]: picker.value }));
  subscribe((changed) => {
    if ("text" in changed && prompt.value !== state.text) prompt.value = state.text;
    if ("tint" in changed) for (const sequence of pair) sequence.setTint();
    for (const field of ["model", "other"]) if (field in changed) pickers[field].value = state[field];
  });
}
