// One written text: its tokens as they stream in, how it ended, its chart, and what can be done with it.

import { inspect, stream } from "./api.js";
import { Chart } from "./chart.js";
import { h, number, toast } from "./dom.js";
import { completionBody } from "./requests.js";
import { modelFacts, state } from "./state.js";
import { TokenView, fromLogprobs } from "./tokens.js";

const ENDINGS = {
  stop: "ended by the model or a stop string",
  length: "as long as allowed",
  context_length: "the context is full",
  tool_calls: "a tool is called",
};

export class Sequence {
  /**
   * model: its name. promptIds(): resolves to the ids that this text follows.
   * actions: extra buttons, [label, callback(sequence)]. run(work): runs `work(signal)` as the page's current task.
   */
  constructor({ model, promptIds, run = null, actions = [], chart = true, name = "The model's text" }) {
    Object.assign(this, { model, promptIds, finish: null, seed: null });
    const point = (index) => {
      this.view.highlight(index);
      this.chart?.point(index);
    };
    const onAlternative = run && ((index, token) => run((signal) => this.continueFrom(index, token, signal)));
    this.view = new TokenView({ name, onAlternative, onPoint: point });
    this.chart = chart ? new Chart({ onPoint: point, onChoose: (index) => this.view.spans[index]?.focus() }) : null;
    this.meta = h("span", { class: "meta", "aria-live": "polite" });
    const buttons = actions.map(([text, act]) => h("button", { class: "small quiet", onclick: () => act(this) }, text));
    this.foot = h("div", { class: "sequence-foot" }, this.meta, h("span", { class: "sequence-actions" }, ...buttons));
    this.foot.hidden = true;
    this.element = h("article", { class: "sequence" }, this.view.element, this.chart?.element ?? null, this.foot);
    if (this.chart) this.chart.element.hidden = true;
  }

  get ids() {
    return this.view.tokens.map((token) => token.id);
  }

  get text() {
    return this.view.text;
  }

  /** The ids of the prompt and of this text. */
  async allIds() {
    return [...(await this.promptIds()), ...this.ids];
  }

  begin(seed) {
    Object.assign(this, { seed, finish: null, began: performance.now(), fresh: 0, said: "", kept: this.view.tokens.length });
    this.element.classList.add("writing");
    this.meta.textContent = "";
  }

  /** A streamed choice, of either API. */
  receive(choice) {
    const entries = choice.logprobs?.content ?? [];
    this.said += choice.text ?? choice.delta?.content ?? "";
    if (entries.length) {
      this.fresh += entries.length;
      this.view.add(entries.map(fromLogprobs), "fresh");
    }
    if (choice.finish_reason) this.finish = choice.finish_reason;
  }

  /** Nothing more comes: by itself, or because it was stopped. */
  end(stopped = false) {
    this.element.classList.remove("writing");
    this.view.finish();
    if (!stopped) this.view.cut(this.kept, this.said.length);
    const seconds = (performance.now() - this.began) / 1000;
    const parts = [`${number(this.view.tokens.length)} tokens`];
    if (this.fresh > 1) parts.push(`${(this.fresh / seconds).toFixed(0)} a second`);
    if (this.seed !== null) parts.push(`seed ${this.seed}`);
    parts.push(stopped ? "stopped" : (ENDINGS[this.finish] ?? this.finish ?? ""));
    this.meta.textContent = parts.filter(Boolean).join(" · ");
    this.foot.hidden = false;
    if (!this.view.tokens.length) this.meta.textContent += " · the model added nothing";
    this.showChart().catch(() => {});
  }

  async showChart() {
    if (!this.chart || !this.view.tokens.length) return;
    this.chart.element.hidden = false;
    this.chart.set(this.view.tokens);
    const ids = await this.allIds();
    if (ids.length > (modelFacts(this.model)?.inspect.tokens ?? 0)) return;
    const count = this.view.tokens.length;
    const found = await inspect({ model: this.model, tokens: ids, what: ["scores"], top: 1 });
    if (this.view.tokens.length !== count) return; // rewritten meanwhile
    this.view.merge(found.tokens.slice(-count));
    this.chart.set(this.view.tokens);
  }

  /** Rewrites the text from `index` on: first `token`, then what the model says. */
  async continueFrom(index, token, signal) {
    const prompt = [...(await this.promptIds()), ...this.ids.slice(0, index), token.id];
    const { top } = this.view.tokens[index];
    this.view.truncate(index);
    this.view.add([{ ...token, top }], "chosen");
    const body = completionBody(prompt, { model: this.model, n: 1 });
    delete body.grammar; // a constraint holds for a whole text, not for the rest of one
    await write("/v1/completions", body, [this], signal);
  }

  async copy() {
    await navigator.clipboard.writeText(this.text);
    toast("Copied");
  }

  setTint() {
    this.view.setTint(state.tint);
  }
}

/** Streams an answer into its sequences, one for each choice. */
export async function write(path, body, sequences, signal) {
  sequences.forEach((sequence, index) => sequence.begin(body.seed + index));
  try {
    for await (const event of stream(path, body, signal)) {
      for (const choice of event.choices ?? []) sequences[choice.index]?.receive(choice);
    }
  } finally {
    for (const sequence of sequences) sequence.end(!sequence.finish);
  }
}
