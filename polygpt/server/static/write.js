// Completion: the text that the user begins and the model continues, in one sample or several side by side.

import { inspect, tokenize } from "./api.js";
import { $, h, number } from "./dom.js";
import { chosenSeed, completionBody } from "./requests.js";
import { Sequence, write } from "./sequence.js";
import { modelFacts, state, subscribe, update, visit } from "./state.js";
import { Task, alertLine } from "./task.js";
import { legend } from "./tokens.js";
import { writeFragment } from "./url.js";

const prompt = $("#prompt");
const results = $("#results");
let shown = [];

export const task = new Task({
  show(busy) {
    $("#go").hidden = busy;
    $("#stop").hidden = !busy;
    $("#score").disabled = busy;
    $("#regenerate").hidden = busy || !shown.length;
    results.setAttribute("aria-busy", busy);
  },
  fail: alertLine($("#problem")),
});

const run = (work) => task.run(work);

function fit() {
  prompt.rows = Math.min(Math.max(prompt.value.split("\n").length + Math.floor(prompt.value.length / 80), 4), 12);
}

function show(sequences, { heading = null } = {}) {
  shown = sequences;
  results.classList.toggle("several", sequences.length > 1);
  const bar = h("div", { class: "results-bar" }, heading ? h("h2", {}, heading) : null, tints(), legend());
  results.replaceChildren(bar, ...sequences.map((sequence) => sequence.element));
}

function tints() {
  const choices = { probability: "by probability", entropy: "by entropy", none: "no tint" };
  const options = Object.entries(choices).map(([value, text]) => h("option", { value, selected: state.tint === value }, text));
  return h("label", { class: "tint-label" }, "Tint ", h("select", { class: "quiet", onchange: (event) => update({ tint: event.target.value }) }, ...options));
}

/** Where the text of a sequence goes on from: the ids of the prompt, asked for once. */
function promptIds(model, text) {
  let ids;
  return () => (ids ??= tokenize({ model, prompt: text }));
}

const actions = [
  ["Copy", (sequence) => sequence.copy()],
  [
    "Keep and write on",
    (sequence) => {
      setPrompt(prompt.value + sequence.text);
      complete();
    },
  ],
  [
    "Look inside",
    async (sequence) => {
      visit.subject = { model: sequence.model, ids: await sequence.allIds() };
      update({ view: "inspect" });
    },
  ],
];

function setPrompt(text) {
  prompt.value = text;
  update({ text });
  fit();
}

/** Writes on from the prompt. */
export function complete() {
  return run(async (signal) => {
    const { model, n } = state;
    const ids = promptIds(model, prompt.value);
    const body = completionBody(prompt.value, { seed: chosenSeed() });
    const make = (_, index) => new Sequence({ model, promptIds: ids, run, actions, chart: n === 1, name: n > 1 ? `Sample ${index + 1}` : undefined });
    show(Array.from({ length: n }, make));
    writeFragment();
    try {
      await write("/v1/completions", body, shown, signal);
    } finally {
      if (shown.every((sequence) => !sequence.finish && !sequence.view.tokens.length)) results.replaceChildren();
    }
  });
}

/** The scores of a text, or of as much of it as the server scores. */
async function scores(model, text, signal) {
  try {
    return { found: await inspect({ model, text, what: ["scores"] }, signal), heading: "Your text, as the model sees it" };
  } catch (error) {
    if (error.code !== "inspection_too_long") throw error;
  }
  const ids = await tokenize({ model, prompt: text }, signal);
  const most = modelFacts(model).inspect.tokens;
  const found = await inspect({ model, tokens: ids.slice(0, most), what: ["scores"] }, signal);
  return { found, heading: `The first ${number(most)} of ${number(ids.length)} tokens, as the model sees them` };
}

/** Shows the prompt itself as the model sees it, without generating. */
export function score() {
  return run(async (signal) => {
    const { model } = state;
    const { found, heading } = await scores(model, prompt.value, signal);
    const ids = found.tokens.map((token) => token.id);
    const sequence = new Sequence({ model, promptIds: async () => [], run, actions: actions.filter(([name]) => name !== "Keep and write on"), name: "Your text" });
    show([sequence], { heading });
    sequence.view.add(found.tokens);
    sequence.view.finish();
    sequence.chart.element.hidden = false;
    sequence.chart.set(sequence.view.tokens);
    sequence.meta.textContent = `${number(ids.length)} tokens`;
    sequence.foot.hidden = false;
  });
}

function showFacts() {
  const facts = modelFacts();
  if (!facts) return;
  const size = facts.parameters >= 1e6 ? `${(facts.parameters / 1e6).toFixed(0)} M` : number(facts.parameters);
  $("#facts").textContent = `${facts.name} · ${size} parameters · ${number(facts.context_length)} tokens of context`;
  $("#mode-chat").disabled = !facts.chat;
  $("#mode-chat").title = facts.chat ? "" : "This model came without a chat template.";
}

export function start() {
  prompt.value = state.text;
  fit();
  prompt.addEventListener("input", () => {
    update({ text: prompt.value });
    fit();
  });
  $("#go").addEventListener("click", complete);
  $("#regenerate").addEventListener("click", complete);
  $("#score").addEventListener("click", score);
  $("#stop").addEventListener("click", () => task.stop());
  subscribe((changed) => {
    if ("model" in changed) showFacts();
    if ("text" in changed && prompt.value !== state.text) setPrompt(state.text);
    if ("tint" in changed) for (const sequence of shown) sequence.setTint();
  });
  showFacts();
}

export const serverKnown = showFacts;
