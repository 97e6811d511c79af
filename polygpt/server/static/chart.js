// Surprise (bars) and entropy (line) along a text, in bits, on a canvas.

import { h } from "./dom.js";
import { bits, label } from "./tokens.js";

const HEIGHT = 72;
const known = (value) => value !== null && value !== undefined;

export class Chart {
  /** `onPoint(index)`: the pointer is over the token at `index`; `onChoose(index)`: it was clicked. */
  constructor({ onPoint = () => {}, onChoose = () => {} } = {}) {
    this.tokens = [];
    this.pointed = -1;
    this.canvas = h("canvas", { class: "chart-canvas", role: "img", height: HEIGHT });
    this.summary = h("figcaption", { class: "chart-summary" });
    const key = h("span", { class: "chart-key" }, h("i", { class: "key-surprise" }), "surprise", h("i", { class: "key-entropy" }), "entropy");
    this.element = h("figure", { class: "chart" }, this.canvas, h("div", { class: "chart-foot" }, this.summary, key));
    const at = (event) => Math.floor(((event.offsetX / this.canvas.clientWidth) * this.tokens.length));
    this.canvas.addEventListener("pointermove", (event) => onPoint(at(event)));
    this.canvas.addEventListener("click", (event) => onChoose(at(event)));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  set(tokens) {
    this.tokens = tokens;
    this.draw();
  }

  point(index) {
    if (index === this.pointed) return;
    this.pointed = index;
    this.draw();
  }

  draw() {
    const width = this.canvas.clientWidth;
    if (!width || !this.tokens.length) return;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = HEIGHT * ratio;
    const pen = this.canvas.getContext("2d");
    const colour = (name) => getComputedStyle(this.canvas).getPropertyValue(name);
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    const surprise = this.tokens.map((token) => (known(token.logprob) ? bits(-token.logprob) : null));
    const entropy = this.tokens.map((token) => (known(token.entropy) ? bits(token.entropy) : null));
    const top = Math.max(8, ...surprise.concat(entropy).filter(known));
    const y = (value) => HEIGHT - 1 - (value / top) * (HEIGHT - 14);
    const step = width / this.tokens.length;
    pen.fillStyle = colour("--line");
    pen.fillRect(0, HEIGHT - 1, width, 1);
    pen.fillStyle = colour("--tint");
    // Where there are more tokens than pixels, a pixel shows its largest.
    const bar = Math.max(step - (step > 4 ? 1.5 : 0), 1);
    surprise.forEach((value, index) => known(value) && pen.fillRect(index * step, y(value), bar, HEIGHT - 1 - y(value)));
    pen.strokeStyle = colour("--accent");
    pen.lineWidth = 1.5;
    pen.beginPath();
    entropy.forEach((value, index) => known(value) && pen.lineTo((index + 0.5) * step, y(value)));
    pen.stroke();
    if (this.pointed >= 0) {
      pen.fillStyle = colour("--ink");
      pen.fillRect((this.pointed + 0.5) * step - 0.5, 0, 1, HEIGHT);
    }
    pen.fillStyle = colour("--muted");
    pen.fillText(`${top.toFixed(0)} bits`, 2, 10);
    this.#summarize(surprise, entropy);
  }

  #summarize(surprise, entropy) {
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const scored = surprise.filter(known);
    if (!scored.length) return;
    const most = surprise.indexOf(Math.max(...scored));
    const parts = [`${mean(scored).toFixed(2)} bits a token (perplexity ${(2 ** mean(scored)).toFixed(1)})`];
    if (entropy.some(known)) parts.push(`mean entropy ${mean(entropy.filter(known)).toFixed(2)} bits`);
    parts.push(`most surprising: ${label(this.tokens[most])} (${surprise[most].toFixed(1)} bits)`);
    this.summary.textContent = parts.join(" · ");
    this.canvas.setAttribute("aria-label", `Surprise along the text: ${this.summary.textContent}`);
  }
}
