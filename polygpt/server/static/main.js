// The page as a whole: views, the model that is chosen, and whether the server answers.

import { healthy, onOffline, serverSettings } from "./api.js";
import * as chat from "./chat.js";
import * as compare from "./compare.js";
import { $, arrowKeys, h, toast } from "./dom.js";
import * as inspect from "./inspect.js";
import * as settings from "./settings.js";
import * as shortcuts from "./shortcuts.js";
import { modelFacts, state, subscribe, update, visit } from "./state.js";
import * as theme from "./theme.js";
import { fromFragment, writeFragment } from "./url.js";
import * as write from "./write.js";

const RETRY = 1000; // milliseconds between looks at a server that does not answer
const VIEWS = ["write", "inspect", "compare"];

function showView() {
  for (const name of VIEWS) {
    const own = name === state.view;
    $(`#view-${name}`).hidden = !own;
    $(`#tab-${name}`).setAttribute("aria-selected", own);
    $(`#tab-${name}`).tabIndex = own ? 0 : -1;
  }
  if (state.view === "inspect" && visit.server) inspect.show();
}

function showMode() {
  for (const name of ["completion", "chat"]) {
    const own = name === state.mode;
    $(`#${name}`).hidden = !own;
    $(`#mode-${name}`).setAttribute("aria-checked", own);
    $(`#mode-${name}`).tabIndex = own ? 0 : -1;
  }
}

function current() {
  if (state.view === "compare") return { submit: compare.submit, task: compare.task };
  if (state.mode === "chat") return { submit: chat.submit, task: chat.task };
  return { submit: () => !write.task.busy && write.complete(), task: write.task };
}

async function meetServer() {
  try {
    visit.server = await serverSettings();
  } catch (error) {
    return banner(error.message);
  }
  const names = visit.server.models.map((model) => model.name);
  const known = (name, other) => (names.includes(name) ? name : other);
  const model = known(state.model, names[0]);
  const other = known(state.other, names.find((name) => name !== model) ?? model);
  $("#model").replaceChildren(...names.map((name) => h("option", {}, name)));
  $("#model").value = model;
  update({ model, other });
  if (!visit.server.models.find((each) => each.name === model).chat && state.mode === "chat") update({ mode: "completion" });
  limitSettings();
  write.serverKnown();
  compare.serverKnown();
  banner(null);
  showView();
  document.body.dataset.ready = "";
  performance.mark("ready");
}

const limitSettings = () => settings.limit(visit.server.limits, modelFacts().context_length);

function banner(message) {
  const element = $("#banner");
  element.hidden = !message;
  element.textContent = message ?? "";
}

let waiting = false;

/** The server went away: says so, and looks for it until it is back. */
async function lost() {
  if (waiting) return;
  waiting = true;
  banner("The server does not answer. Your text is kept; this page looks for it every second.");
  while (!(await healthy())) await new Promise((resolve) => setTimeout(resolve, RETRY));
  waiting = false;
  await meetServer();
  toast("The server is back");
}

async function share() {
  if (!writeFragment()) return toast("The text is too long for a link");
  try {
    await navigator.clipboard.writeText(location.href);
    toast("Link copied: it holds this text and these settings");
  } catch {
    toast("The link is in the address bar");
  }
}

function start() {
  update(fromFragment(location.hash));
  theme.start();
  settings.start();
  write.start();
  chat.start();
  compare.start();
  inspect.start();
  shortcuts.start({ submit: () => current().submit(), stop: () => current().task.stop(), view: (view) => update({ view }), settings: () => settings.open() });
  subscribe((changed) => {
    if ("view" in changed) showView();
    if ("mode" in changed) showMode();
    if ("model" in changed) {
      $("#model").value = state.model;
      if (visit.server) limitSettings();
    }
  });
  arrowKeys($(".bar .tabs"), '[role="tab"]', (tab) => tab.click());
  arrowKeys($(".modes"), '[role="radio"]:enabled', (radio) => radio.click());
  for (const name of VIEWS) $(`#tab-${name}`).addEventListener("click", () => update({ view: name }));
  for (const name of ["completion", "chat"]) $(`#mode-${name}`).addEventListener("click", () => update({ mode: name }));
  $("#model").addEventListener("change", (event) => update({ model: event.target.value }));
  $("#share").addEventListener("click", share);
  addEventListener("hashchange", () => location.reload());
  onOffline(lost);
  setInterval(async () => !document.hidden && !waiting && !(await healthy()) && lost(), 5000);
  showView();
  showMode();
  meetServer();
}

start();
