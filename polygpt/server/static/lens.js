// The logit lens: what each layer would predict after each token, read off its residual stream.

import { inspect } from "./api.js";
import { h, percent } from "./dom.js";
import { label } from "./tokens.js";

const SHOWN = 12; // positions side by side

export class LensPanel {
  static tint = ""; // the class of the tokens while this is shown

  constructor({ subject, point, signal }) {
    Object.assign(this, { subject, report: point, signal });
    this.start = Math.max(subject.ids.length - SHOWN, 0);
    this.table = h("table", { class: "lens" });
    this.back = h("button", { class: "small", onclick: () => this.move(-SHOWN) }, "← Earlier");
    this.on = h("button", { class: "small", onclick: () => this.move(SHOWN) }, "Later →");
    this.told = h("p", { class: "told", "aria-live": "polite" });
    const help = h("p", { class: "help" }, "A row is a layer, the last one on top. Each cell is the token that the model would predict there if it ended at that layer; the stronger the colour, the surer it is. Framed: the token that really follows.");
    this.element = h("div", {}, help, h("div", { class: "lens-bar" }, this.back, this.on, this.told), h("div", { class: "lens-wrap", tabindex: 0, "aria-label": "Predictions by layer" }, this.table));
  }

  move(step) {
    const last = Math.max(this.subject.ids.length - SHOWN, 0);
    this.start = Math.min(Math.max(this.start + step, 0), last);
    return this.load(this.signal());
  }

  async load(signal) {
    const { model, ids, tokens } = this.subject;
    const asked = this.start;
    const { logit_lens: lens } = await inspect({ model, tokens: ids, what: ["logit_lens"], start: asked, count: SHOWN, top: 5 }, signal);
    if (asked !== this.start) return;
    const places = Array.from({ length: lens.count }, (_, i) => asked + i);
    const head = h("tr", {}, h("th", { scope: "col" }, "layer"), ...places.map((at) => h("th", { scope: "col", onpointerenter: () => this.report(at) }, label(tokens[at]))));
    const rows = lens.layers.map((cells, layer) =>
      h("tr", {}, h("th", { scope: "row" }, String(layer)), ...cells.map((cell, i) => this.#cell(cell, layer, places[i], tokens[places[i] + 1]?.id))),
    );
    this.table.replaceChildren(h("thead", {}, head), h("tbody", {}, ...rows.reverse()));
    this.back.disabled = asked === 0;
    this.on.disabled = asked + SHOWN >= ids.length;
    this.told.textContent = `After tokens ${asked + 1} to ${asked + lens.count}`;
  }

  #cell(cell, layer, at, follows) {
    const [best] = cell.top;
    const p = Math.exp(best.logprob);
    const others = cell.top.map((other) => `${label(other)} ${percent(Math.exp(other.logprob))}`).join("\n");
    const td = h("td", { title: others, "data-sure": Math.min(Math.floor(p * 10), 9), class: best.id === follows ? "right" : "" }, label(best));
    td.addEventListener("pointerenter", () => {
      this.report(at);
      this.told.textContent = `Layer ${layer}: ${others.replaceAll("\n", ", ")}`;
    });
    return td;
  }
}
