// Attention maps: every head small, one enlarged, and the tokens lit by what the pointed one attends to.

import { inspect } from "./api.js";
import { h } from "./dom.js";
import { label } from "./tokens.js";

const EDGE = 512; // pixels of the enlarged map's canvas, about

const decode = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

/** A byte is 255 · sqrt(weight), which is also what the eye sees well. */
const weight = (byte) => (byte / 255) ** 2;

/** The numbers of a colour that style.css registers, so that the browser resolves it for light or dark. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).match(/[\d.]+/g).slice(0, 3).map(Number);
}

function paint(canvas, bytes, size, scale = 1) {
  const side = size * scale;
  canvas.width = canvas.height = side;
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(side, side);
  const [ground, ink] = [colour("--map-ground"), colour("--map-ink")];
  for (let y = 0; y < side; y++) {
    const row = Math.floor(y / scale) * size;
    for (let x = 0; x < side; x++) {
      const share = bytes[row + Math.floor(x / scale)] / 255;
      const at = 4 * (y * side + x);
      for (let c = 0; c < 3; c++) image.data[at + c] = ground[c] + (ink[c] - ground[c]) * share;
      image.data[at + 3] = 255;
    }
  }
  pen.putImageData(image, 0, 0);
}

export class AttentionPanel {
  static tint = "lit"; // the class of the tokens while this is shown

  constructor({ subject, view, point, signal }) {
    Object.assign(this, { subject, view, report: point, signal, layer: 0, head: 0, layers: new Map(), index: subject.ids.length - 1 });
    this.grid = h("div", { class: "heads", role: "grid", "aria-label": "Attention of every head; a row is a layer" });
    this.grid.addEventListener("keydown", (event) => this.#key(event));
    this.big = h("canvas", { class: "map", role: "img" });
    this.big.addEventListener("pointermove", (event) => this.#overMap(event));
    this.caption = h("h3", {});
    this.told = h("p", { class: "told", "aria-live": "polite" });
    const help = h("p", { class: "help" }, "A row is a token, and its dark cells are the earlier tokens it attends to. In the text above, the tokens that the pointed one attends to are lit.");
    this.large = h("div", { class: "large" }, this.caption, this.big, this.told, help);
    this.element = h("div", { class: "attention" }, h("div", { class: "heads-wrap" }, this.grid), this.large);
  }

  async load(signal) {
    const { model, ids } = this.subject;
    const { attention } = await inspect({ model, tokens: ids, what: ["attention"] }, signal);
    attention.thumbnails.forEach((text, layer) => this.#row(text && decode(text), layer, attention.heads[layer], attention.size));
    const first = attention.thumbnails.findIndex((text) => text !== null);
    if (first < 0) this.told.textContent = "This model's attention has no weights to show.";
    else await this.choose(first, 0, signal);
  }

  #row(bytes, layer, heads, size) {
    const cells = Array.from({ length: bytes ? heads : 0 }, (_, head) => {
      const canvas = h("canvas", { "aria-hidden": "true" });
      paint(canvas, bytes.subarray(head * size * size, (head + 1) * size * size), size);
      const name = `Layer ${layer}, head ${head}`;
      const button = h("button", { class: "head", role: "gridcell", "aria-label": name, title: name, tabindex: -1, onclick: () => this.choose(layer, head) }, canvas);
      button.dataset.at = `${layer}.${head}`;
      return button;
    });
    this.grid.append(h("div", { class: "heads-row", role: "row" }, h("span", { class: "layer-name", role: "rowheader" }, String(layer)), ...cells));
  }

  async choose(layer, head, signal = this.signal()) {
    for (const button of this.grid.querySelectorAll(".head")) {
      const own = button.dataset.at === `${layer}.${head}`;
      button.setAttribute("aria-selected", own);
      button.tabIndex = own ? 0 : -1;
    }
    Object.assign(this, { layer, head });
    this.caption.textContent = `Layer ${layer}, head ${head}`;
    if (!this.layers.has(layer)) {
      const { model, ids } = this.subject;
      this.large.setAttribute("aria-busy", true);
      const { attention } = await inspect({ model, tokens: ids, what: ["attention"], layer }, signal);
      this.layers.set(layer, { bytes: decode(attention.maps), size: attention.size });
      this.large.removeAttribute("aria-busy");
    }
    if (this.layer !== layer || this.head !== head) return;
    const { bytes, size } = this.layers.get(layer);
    this.map = bytes.subarray(head * size * size, (head + 1) * size * size);
    paint(this.big, this.map, size, Math.max(Math.floor(EDGE / size), 1));
    this.big.dataset.at = `${layer}.${head}`;
    this.big.setAttribute("aria-label", `Attention of layer ${layer}, head ${head}: ${size} by ${size} tokens`);
    this.point(this.index);
  }

  /** Lights what token `index` attends to. */
  point(index) {
    this.index = index;
    if (!this.map) return;
    const size = this.subject.ids.length;
    const row = this.map.subarray(index * size, index * size + size);
    this.view.spans.forEach((span, at) => {
      const lit = at <= index ? Math.round((row[at] / 255) * 9) : 0;
      if (lit) span.dataset.lit = lit;
      else delete span.dataset.lit;
    });
    const best = [...row.subarray(0, index + 1)].map((byte, at) => [byte, at]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    const parts = best.filter(([byte]) => byte > 25).map(([byte, at]) => `“${label(this.subject.tokens[at])}” ${(100 * weight(byte)).toFixed(0)} %`);
    this.told.textContent = `“${label(this.subject.tokens[index])}” attends to ${parts.join(", ") || "nothing in particular"}.`;
  }

  #overMap(event) {
    const size = this.subject.ids.length;
    this.report(Math.min(Math.floor((event.offsetY / this.big.clientHeight) * size), size - 1));
  }

  #key(event) {
    const [layer, head] = (event.target.dataset.at ?? "").split(".").map(Number);
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [down, right] = moves[event.key];
    const next = this.grid.querySelector(`[data-at="${layer + down}.${head + right}"]`);
    next?.focus();
    next?.click();
  }
}
