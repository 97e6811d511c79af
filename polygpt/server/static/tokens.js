// A text as its tokens: tinted by how likely each was, with its alternatives on hover, tap or keyboard.

import { alternatives } from "./alternatives.js";
import { h, percent } from "./dom.js";
import { state } from "./state.js";

// Bits of surprise at which a tint begins; the last is the strongest.
const LEVELS = [0.5, 1, 2, 3, 4.5, 6, 8, 10, 13];
export const bits = (nats) => nats / Math.LN2;
const level = (value) => LEVELS.filter((limit) => value >= limit).length;

/** The bytes that the API's name of a token stands for: its text, or `bytes:\xe2\x82`. */
export function bytesOf(token) {
  if (token.bytes) return Uint8Array.from(token.bytes);
  const name = token.text ?? token.token;
  if (!name.startsWith("bytes:\\x")) return new TextEncoder().encode(name);
  return Uint8Array.from(name.slice(6).match(/[0-9a-f]{2}/g) ?? [], (pair) => Number.parseInt(pair, 16));
}

/** A token of a completion's log probabilities in the form of those of /v1/inspect. */
export const fromLogprobs = (entry) => ({
  id: entry.id,
  bytes: entry.bytes,
  logprob: entry.logprob,
  top: (entry.top_logprobs ?? []).map((other) => ({ id: other.id, text: other.token, bytes: other.bytes, logprob: other.logprob })),
});

/** How a token is shown where it stands alone: blanks visible. */
export function label(token) {
  const name = token.text ?? token.token ?? new TextDecoder().decode(bytesOf(token));
  return name.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "·") || "∅";
}

export class TokenView {
  /**
   * onAlternative(index, token): an alternative to the token at `index` was chosen; without it they are only shown.
   * onPoint(index): the pointer or the keyboard is on a token. hovering: whether the pointer alone opens its card.
   */
  constructor({ name, onAlternative = null, onPoint = () => {}, hovering = true }) {
    this.hovering = hovering;
    this.tokens = [];
    this.spans = [];
    this.onAlternative = onAlternative;
    this.onPoint = onPoint;
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.element = h("div", { class: "tokens", role: "group", "aria-label": name, "data-tint": state.tint });
    this.element.addEventListener("pointerover", (event) => this.#hover(event));
    this.element.addEventListener("pointerleave", () => alternatives.leave());
    this.element.addEventListener("click", (event) => this.#click(event));
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.element.addEventListener("focusin", (event) => this.#point(this.#indexOf(event.target)));
  }

  get text() {
    return this.spans.map((span) => span.textContent).join("");
  }

  clear() {
    this.truncate(0);
  }

  /** Keeps the first tokens only. */
  truncate(count) {
    for (const span of this.spans.splice(count)) span.remove();
    this.tokens.length = Math.min(this.tokens.length, count);
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  /** Nothing more comes: bytes that wait for the rest of their character are shown as a replacement. */
  finish() {
    const rest = this.decoder.decode();
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    if (rest) this.spans.at(-1).append(rest);
  }

  /** Cuts the text from token `from` on to `length` characters: a stop string may end within a token. */
  cut(from, length) {
    for (const span of this.spans.slice(from)) {
      if (span.textContent.length > length) span.textContent = span.textContent.slice(0, Math.max(length, 0));
      length -= span.textContent.length;
    }
  }

  /** Appends tokens: {id, logprob, top, entropy}, and text or bytes. */
  add(tokens, className = "") {
    const added = document.createDocumentFragment();
    for (const token of tokens) {
      const text = this.decoder.decode(bytesOf(token), { stream: true });
      const span = h("span", { class: `token ${className}`, role: "button", tabindex: this.spans.length ? -1 : 0 }, text);
      span.dataset.index = this.tokens.length;
      if (text && /^\s*\n\s*$/.test(text)) span.classList.add("newline");
      this.tokens.push(token);
      this.spans.push(span);
      this.#tint(span, token);
      added.append(span);
    }
    this.element.append(added);
  }

  /** Takes over entropies and the like, which came later than the tokens. */
  merge(tokens) {
    tokens.forEach((token, index) => {
      if (!this.tokens[index] || token.logprob === null) return;
      Object.assign(this.tokens[index], { entropy: token.entropy, rank: token.rank });
      this.#tint(this.spans[index], this.tokens[index]);
    });
  }

  setTint(tint) {
    this.element.dataset.tint = tint;
    this.spans.forEach((span, index) => this.#tint(span, this.tokens[index]));
  }

  #tint(span, token) {
    const value = this.element.dataset.tint === "entropy" ? token.entropy : token.logprob === null ? null : -token.logprob;
    if (this.element.dataset.tint === "none" || value === null || value === undefined) delete span.dataset.level;
    else span.dataset.level = level(bits(value));
    if (token.logprob !== null && token.logprob !== undefined) span.setAttribute("aria-description", percent(Math.exp(token.logprob)));
  }

  #indexOf(target) {
    const span = target.closest?.(".token");
    return span ? Number(span.dataset.index) : -1;
  }

  #point(index) {
    if (index < 0) return;
    for (const span of this.element.querySelectorAll('.token[tabindex="0"]')) span.tabIndex = -1;
    this.spans[index].tabIndex = 0;
    this.onPoint(index);
  }

  highlight(index) {
    this.element.querySelector(".pointed")?.classList.remove("pointed");
    this.spans[index]?.classList.add("pointed");
  }

  #hover(event) {
    const index = this.#indexOf(event.target);
    if (index < 0 || event.pointerType === "touch") return;
    this.onPoint(index);
    if (this.hovering) alternatives.hover(this.spans[index], () => this.#show(index, false));
  }

  #click(event) {
    const index = this.#indexOf(event.target);
    if (index >= 0) this.#show(index, event.detail === 0);
  }

  #show(index, focus) {
    const pick = this.onAlternative && ((other) => this.onAlternative(index, other));
    alternatives.show(this.spans[index], this.tokens[index], { pick, focus });
  }

  #key(event) {
    const index = this.#indexOf(event.target);
    if (index < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: this.spans.length - 1 };
    if (event.key in moves) {
      const next = Math.min(Math.max(moves[event.key], 0), this.spans.length - 1);
      alternatives.hide();
      this.#point(next);
      this.spans[next].focus();
    } else if (event.key === "Enter" || event.key === " " || event.key === "ArrowDown") {
      this.#show(index, true);
    } else return;
    event.preventDefault();
  }
}

/** What the tints mean. */
export function legend() {
  const steps = Array.from({ length: LEVELS.length + 1 }, (_, index) => h("i", { "data-level": index }));
  return h("span", { class: "legend", "aria-hidden": "true" }, "likely", ...steps, "surprising");
}
