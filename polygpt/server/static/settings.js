// The side panel: every setting with a line that says what it does.

import { $, h } from "./dom.js";
import { DEFAULTS, state, subscribe, update } from "./state.js";

const panel = $("#settings");
const opener = $("#open-settings");

const GROUPS = [
  [
    "Length and choice",
    [
      { name: "max_tokens", title: "Length", min: 1, max: 1024, step: 1, help: "How many tokens are written at most. A token is about three quarters of a word." },
      { name: "temperature", title: "Temperature", min: 0, max: 2, step: 0.05, help: "0 always takes the likeliest token. Higher is more varied, and wilder." },
      { name: "top_p", title: "Top p", min: 0.01, max: 1, step: 0.01, help: "Chooses among the likeliest tokens that together have this probability. 1 keeps all." },
      { name: "top_k", title: "Top k", min: 0, max: 200, step: 1, help: "Chooses among this many of the likeliest tokens. 0 keeps all." },
      { name: "min_p", title: "Min p", min: 0, max: 0.99, step: 0.01, help: "Drops tokens less likely than this share of the likeliest one." },
      { name: "n", title: "Samples", min: 1, max: 8, step: 1, help: "This many texts from the same prompt, side by side." },
      { name: "seed", title: "Seed", text: true, placeholder: "random", help: "A number here makes the same text come out every time." },
    ],
  ],
  [
    "Repetition",
    [
      { name: "repetition_penalty", title: "Repetition penalty", min: 0.5, max: 2, step: 0.05, help: "Above 1, tokens that were written already become less likely." },
      { name: "presence_penalty", title: "Presence penalty", min: -2, max: 2, step: 0.1, help: "Lowers every token that occurred, once." },
      { name: "frequency_penalty", title: "Frequency penalty", min: -2, max: 2, step: 0.1, help: "Lowers a token each time it occurs." },
    ],
  ],
  [
    "Form",
    [
      { name: "stop", title: "Stop at", area: 2, placeholder: "one a line; \\n is a new line", help: "The text ends before any of these strings." },
      { name: "schema", title: "JSON schema", area: 7, code: true, placeholder: '{\n  "type": "object",\n  "properties": {"name": {"type": "string"}},\n  "required": ["name"]\n}', help: "The whole answer is JSON of this form. Empty: any text." },
      { name: "system", title: "System message", area: 3, placeholder: "You are…", help: "Told to the model before a chat begins." },
    ],
  ],
];

function field(setting) {
  const id = `setting-${setting.name}`;
  const described = `${id}-help`;
  const common = { id, "aria-describedby": described, placeholder: setting.placeholder };
  const set = (value) => update({ [setting.name]: value });
  let inputs;
  if (setting.area) inputs = [h("textarea", { ...common, class: setting.code ? "code" : "", rows: setting.area, spellcheck: "false", oninput: (event) => set(event.target.value) })];
  else if (setting.text) inputs = [h("input", { ...common, inputmode: "numeric", autocomplete: "off", oninput: (event) => set(event.target.value) })];
  else inputs = slider(setting, common, set);
  for (const input of inputs) input.value = state[setting.name];
  const row = h("div", { class: "setting" }, h("label", { for: id }, setting.title), ...inputs, h("p", { class: "help", id: described }, setting.help));
  if (setting.name === "schema") row.append(h("p", { class: "problem small", id: "schema-problem", role: "alert", hidden: true }));
  return row;
}

/** A number as a field and a slider that follow each other. */
function slider(setting, common, set) {
  const range = { min: setting.min, max: setting.max, step: setting.step };
  const changed = (event) => {
    const value = Number(event.target.value);
    const valid = event.target.value !== "" && value >= setting.min && value <= setting.max && (setting.step !== 1 || Number.isInteger(value));
    box.setAttribute("aria-invalid", !valid);
    if (!valid) return;
    for (const input of [box, track]) if (input !== event.target) input.value = value;
    set(value);
  };
  const box = h("input", { ...common, ...range, type: "number", class: "number", oninput: changed });
  const track = h("input", { ...range, type: "range", "aria-label": setting.title, tabindex: -1, oninput: changed });
  return [box, track];
}

function checkSchema() {
  const line = $("#schema-problem");
  try {
    if (state.schema.trim()) JSON.parse(state.schema);
    line.hidden = true;
  } catch (error) {
    line.textContent = `Not JSON yet: ${error.message}`;
    line.hidden = false;
  }
}

function build() {
  // Beyond the first group only what was changed is open from the start.
  const groups = GROUPS.map(([title, fields], index) => {
    const open = index === 0 || fields.some(({ name }) => state[name] !== DEFAULTS[name]);
    return h("details", { open }, h("summary", {}, title), ...fields.map(field));
  });
  panel.replaceChildren(
    h("div", { class: "settings-head" }, h("h2", {}, "Settings"), h("button", { class: "quiet small", onclick: reset }, "Reset"), h("button", { class: "quiet small", onclick: () => open(false), "aria-label": "Close settings" }, "Close")),
    ...groups,
    h("p", { class: "help shortcuts-hint" }, "Press ", h("kbd", {}, "?"), " for the keyboard shortcuts."),
  );
  checkSchema();
}

function reset() {
  const names = GROUPS.flatMap(([, fields]) => fields.map((setting) => setting.name));
  update(Object.fromEntries(names.map((name) => [name, DEFAULTS[name]])));
  build();
}

export function open(wanted = panel.hidden) {
  panel.hidden = !wanted;
  opener.setAttribute("aria-expanded", wanted);
  document.body.classList.toggle("with-settings", wanted);
  if (wanted) panel.querySelector("input")?.focus({ preventScroll: true });
  else opener.focus();
}

export function start() {
  build();
  opener.addEventListener("click", () => open());
  panel.addEventListener("keydown", (event) => event.key === "Escape" && open(false));
  subscribe((changed) => "schema" in changed && checkSchema());
  if (matchMedia("(min-width: 1100px)").matches) {
    panel.hidden = false;
    opener.setAttribute("aria-expanded", true);
    document.body.classList.add("with-settings");
  }
}

/** Limits of the server, for fields that have one. */
export function limit({ max_n: most }, context) {
  const setting = (name) => GROUPS.flatMap(([, fields]) => fields).find((each) => each.name === name);
  setting("n").max = Math.min(8, most);
  setting("max_tokens").max = context;
  for (const input of panel.querySelectorAll('#setting-max_tokens, #setting-max_tokens + input[type="range"]')) input.max = context;
}
