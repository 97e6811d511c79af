// Looking inside: a text as tokens, and below it attention, the logit lens or experts, each computed when it is opened.

import { inspect } from "./api.js";
import { AttentionPanel } from "./attention.js";
import { $, arrowKeys, h, number } from "./dom.js";
import { ExpertsPanel } from "./experts.js";
import { LensPanel } from "./lens.js";
import { modelFacts, state, subscribe, visit } from "./state.js";
import { Task, alertLine } from "./task.js";
import { TokenView } from "./tokens.js";

const PANELS = { attention: ["Attention", AttentionPanel], lens: ["Logit lens", LensPanel], experts: ["Experts", ExpertsPanel] };

const root = $("#view-inspect");
const title = h("p", { class: "inspect-intro" });
const problem = h("p", { class: "problem", role: "alert", hidden: true });
const strip = h("div", { class: "strip" });
const tabs = h("div", { class: "tabs inner", role: "tablist", "aria-label": "What to look at" });
const area = h("div", { class: "inspect-area", role: "tabpanel", "aria-live": "polite" });
root.append(title, problem, strip, tabs, area);

let chosen = "attention";
let view = null;
let panel = null;
let subject = null; // {model, ids} whose tokens are shown

const alert = alertLine(problem);
const task = new Task({
  show: (busy) => area.setAttribute("aria-busy", busy),
  fail(message) {
    alert(message);
    if (message && !subject) title.textContent = "";
  },
});

function drawTabs() {
  const facts = modelFacts(subject?.model ?? state.model);
  if (chosen === "experts" && !facts?.experts) chosen = "attention";
  const names = Object.entries(PANELS).filter(([name]) => name !== "experts" || facts?.experts);
  tabs.replaceChildren(
    ...names.map(([name, [text]]) =>
      h("button", { role: "tab", id: `inner-${name}`, "aria-selected": String(name === chosen), tabindex: name === chosen ? 0 : -1, onclick: () => choose(name) }, text),
    ),
  );
  area.setAttribute("aria-labelledby", `inner-${chosen}`);
}

function choose(name) {
  chosen = name;
  drawTabs();
  load();
}

/** The token that the pointer or the keyboard is on, told to the panel. */
function point(index) {
  view?.highlight(index);
  panel?.point?.(index);
}

function load() {
  return task.run(async (signal) => {
    const Panel = PANELS[chosen][1];
    view.element.className = `tokens ${Panel.tint}`;
    panel = new Panel({ subject, view, point, signal: () => signal });
    const waiting = h("p", { class: "waiting" }, "Computing…");
    area.replaceChildren(waiting, panel.element);
    await panel.load(signal);
    waiting.remove();
  });
}

/** Shows the text of `visit.subject`, or else that of the page. */
export function show() {
  const wanted = visit.subject;
  const text = state.mode === "chat" ? state.messages.map((message) => message.content).join("\n") : state.text;
  if (!wanted && !text) {
    title.textContent = "Write or paste a text first; then look here at what the model does with it.";
    return;
  }
  if (subject && wanted && subject.ids === wanted.ids) return;
  if (!subject) title.textContent = "Computing…";
  task.run(async (signal) => {
    const model = wanted?.model ?? state.model;
    const body = wanted ? { model, tokens: wanted.ids } : { model, text };
    const most = modelFacts(model)?.inspect.attention_tokens ?? 512;
    const cut = wanted && wanted.ids.length > most;
    if (cut) body.tokens = wanted.ids.slice(-most);
    const found = await inspect({ ...body, what: ["scores"] }, signal);
    subject = { model, ids: wanted && !cut ? wanted.ids : found.tokens.map((token) => token.id), tokens: found.tokens };
    visit.subject = { model, ids: subject.ids };
    title.textContent = `${number(subject.ids.length)} tokens in ${model}${cut ? " (the last ones: earlier ones exceed the limit)" : ""}. Point at a token or move with the arrow keys; click it for its alternatives.`;
    view = new TokenView({ name: "The text that is looked into", onPoint: point, hovering: false });
    view.add(found.tokens);
    view.finish();
    strip.replaceChildren(view.element);
    drawTabs();
    load();
  });
}

export function start() {
  arrowKeys(tabs, '[role="tab"]', (tab) => tab.click());
  subscribe((changed) => {
    if ("text" in changed || "model" in changed) visit.subject = subject = null;
    if ("tint" in changed) view?.setTint(state.tint);
  });
}
