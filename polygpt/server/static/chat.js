// A conversation: messages one below the other, the model's as tokens like any other text it writes.

import { tokenize } from "./api.js";
import { $, h } from "./dom.js";
import { chatBody, chosenSeed, conversation } from "./requests.js";
import { Sequence, write } from "./sequence.js";
import { state, subscribe, update, visit } from "./state.js";
import { Task, alertLine } from "./task.js";
import { writeFragment } from "./url.js";

const root = $("#chat");
const thread = h("div", { class: "thread", role: "log", "aria-label": "Conversation" });
const input = h("textarea", { class: "paper", rows: 2, "aria-label": "Your message", placeholder: "Say something…" });
const send = h("button", { class: "primary", onclick: () => submit() }, "Send ", h("kbd", {}, "Ctrl ↵"));
const stop = h("button", { hidden: true, onclick: () => task.stop() }, "Stop ", h("kbd", {}, "Esc"));
const again = h("button", { hidden: true, onclick: () => answer() }, "Answer again");
const clear = h("button", { class: "quiet", hidden: true, onclick: () => restart() }, "New conversation");
const problem = h("p", { class: "problem", role: "alert", hidden: true });
root.append(thread, input, h("div", { class: "actions" }, send, stop, again, clear), problem);

// The sequences of the model's answers, by their place in state.messages.
let answers = new Map();

export const task = new Task({
  show(busy) {
    send.hidden = busy;
    stop.hidden = !busy;
    again.hidden = clear.hidden = busy || !state.messages.length;
  },
  fail: alertLine(problem),
});

const run = (work) =>
  task.run(async (signal) => {
    try {
      await work(signal);
    } finally {
      keep();
    }
  });

/** The answers' texts, as they now are, into the state. */
function keep() {
  const messages = state.messages.map((message, index) => {
    const sequence = answers.get(index);
    return sequence ? { role: "assistant", content: sequence.text } : message;
  });
  update({ messages });
}

function draw() {
  const rows = state.messages.map((message, index) => {
    const own = message.role === "user";
    const body = answers.get(index)?.element ?? h("div", { class: "said" }, message.content);
    return h("div", { class: `message ${message.role}` }, h("h3", { class: "who" }, own ? "You" : "Model"), body);
  });
  thread.replaceChildren(...rows);
  again.hidden = clear.hidden = task.busy || !state.messages.length;
}

function restart() {
  answers = new Map();
  update({ messages: [] });
  draw();
  input.focus();
}

export function submit() {
  const content = input.value.trim();
  if (!content || task.busy) return;
  input.value = "";
  update({ messages: [...state.messages, { role: "user", content }] });
  answer();
}

/** Answers the last message of the user; an answer that stands there already is written anew. */
export function answer() {
  return run(async (signal) => {
    const last = state.messages.findLastIndex((message) => message.role === "user");
    const before = state.messages.slice(0, last + 1);
    const { model } = state;
    const body = chatBody(before, { seed: chosenSeed() });
    let ids;
    const promptIds = () => (ids ??= tokenize({ model, messages: conversation(before) }));
    const actions = [
      ["Copy", (sequence) => sequence.copy()],
      [
        "Look inside",
        async (sequence) => {
          visit.subject = { model, ids: await sequence.allIds() };
          update({ view: "inspect" });
        },
      ],
    ];
    const sequence = new Sequence({ model, promptIds, run, actions, name: "The model's answer" });
    for (const index of [...answers.keys()]) if (index > last) answers.delete(index);
    answers.set(last + 1, sequence);
    update({ messages: [...before, { role: "assistant", content: "" }] });
    draw();
    writeFragment();
    await write("/v1/chat/completions", body, [sequence], signal);
  });
}

export function start() {
  draw();
  subscribe((changed) => {
    if ("tint" in changed) for (const sequence of answers.values()) sequence.setTint();
  });
}

export const focusInput = () => input.focus();
