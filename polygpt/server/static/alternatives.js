// The card over a token: the ten likeliest alternatives with their probabilities. One for the whole page.

import { h, percent } from "./dom.js";
import { bits, label } from "./tokens.js";

const DELAY = 120; // milliseconds before a hovered token shows its card, and before one that is left hides it

class Alternatives {
  #card = null;
  #token = null;
  #timer = null;

  /** The pointer is over a token: shows its card a moment later, at once if another is shown. */
  hover(span, show) {
    clearTimeout(this.#timer);
    if (span === this.#token) return;
    this.#timer = setTimeout(show, this.#card ? 60 : DELAY);
  }

  leave() {
    clearTimeout(this.#timer);
    if (this.#card?.contains(document.activeElement)) return;
    this.#timer = setTimeout(() => this.hide(), 2 * DELAY);
  }

  hide({ focus = false } = {}) {
    clearTimeout(this.#timer);
    const token = this.#token;
    this.#card?.remove();
    token?.classList.remove("open");
    this.#card = this.#token = null;
    if (focus) token?.focus();
  }

  /** `pick(alternative)` continues from one; `focus`: the keyboard asked for it. */
  show(span, token, { pick = null, focus = false }) {
    this.hide();
    this.#token = span;
    span.classList.add("open");
    this.#card = h(
      "div",
      {
        class: "alternatives",
        role: "dialog",
        "aria-label": `Alternatives to ${label(token)}`,
        onpointerenter: () => clearTimeout(this.#timer),
        onpointerleave: () => this.leave(),
        onkeydown: (event) => this.#key(event),
      },
      this.#head(token),
      this.#list(token, pick),
      pick && token.top?.length ? h("p", { class: "hint" }, "Choose one to continue from it.") : null,
    );
    document.body.append(this.#card);
    this.#place(span);
    if (focus) this.#card.querySelector("button")?.focus();
  }

  #head(token) {
    const known = token.logprob !== null && token.logprob !== undefined;
    const facts = known
      ? [percent(Math.exp(token.logprob)), `${bits(-token.logprob).toFixed(1)} bits`]
      : ["the first token: nothing predicts it"];
    if (token.entropy !== null && token.entropy !== undefined) facts.push(`entropy ${bits(token.entropy).toFixed(1)} bits`);
    return h("div", { class: "card-head" }, h("b", { class: "sample" }, label(token)), h("span", {}, facts.join(" · ")));
  }

  #list(token, pick) {
    const rows = (token.top ?? []).map((other) => {
      const p = Math.exp(other.logprob);
      const bar = h("meter", { min: 0, max: 1, value: p, "aria-hidden": "true" });
      const parts = [h("span", { class: "sample" }, label(other)), bar, h("span", { class: "p" }, percent(p))];
      const attributes = { class: other.id === token.id ? "row own" : "row" };
      if (!pick) return h("li", {}, h("div", attributes, ...parts));
      const choose = () => {
        this.hide();
        pick(other);
      };
      return h("li", {}, h("button", { ...attributes, onclick: choose }, ...parts));
    });
    return h("ol", {}, ...rows);
  }

  #place(span) {
    const at = (span.getClientRects()[0] ?? span.getBoundingClientRect());
    const { offsetWidth: width, offsetHeight: height } = this.#card;
    const left = Math.min(Math.max(at.left, 8), document.documentElement.clientWidth - width - 8);
    const below = at.bottom + 6;
    const top = below + height > innerHeight - 8 && at.top - height - 6 > 8 ? at.top - height - 6 : below;
    this.#card.style.left = `${left + scrollX}px`;
    this.#card.style.top = `${top + scrollY}px`;
  }

  #key(event) {
    const buttons = [...this.#card.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) buttons[(at + step + buttons.length) % buttons.length]?.focus();
    else if (event.key === "Escape" || event.key === "Tab") this.hide({ focus: true });
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

export const alternatives = new Alternatives();

addEventListener("keydown", (event) => event.key === "Escape" && alternatives.hide());
addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".alternatives, .token")) alternatives.hide();
});
