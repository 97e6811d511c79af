// Which experts took each token, by layer, and how evenly they are used.

import { inspect } from "./api.js";
import { h, percent } from "./dom.js";

const COLOURS = 8;

export class ExpertsPanel {
  static tint = "by-expert"; // the class of the tokens while this is shown

  constructor({ subject, view, point }) {
    Object.assign(this, { subject, view, report: point, layer: -1, index: subject.ids.length - 1 });
    this.picker = h("select", { "aria-label": "Layer", onchange: (event) => this.choose(Number(event.target.value)) });
    this.told = h("p", { class: "told", "aria-live": "polite" });
    this.loads = h("ol", { class: "loads", "aria-label": "Mean share of each expert" });
    const help = h("p", { class: "help" }, "Each token of the text above has the colour of the expert with the largest share in it. The bars are the experts' mean shares over this text.");
    this.element = h("div", { class: "experts" }, h("label", {}, "Layer ", this.picker), this.told, this.loads, help);
  }

  async load(signal) {
    const { model, ids } = this.subject;
    const { experts } = await inspect({ model, tokens: ids, what: ["experts"] }, signal);
    this.layers = experts.layers;
    const with_experts = this.layers.flatMap((layer, index) => (layer ? [index] : []));
    this.picker.replaceChildren(...with_experts.map((index) => h("option", { value: index }, String(index))));
    this.choose(with_experts[0]);
  }

  choose(layer) {
    this.layer = layer;
    const { tokens, mean, num_experts: count } = this.layers[layer];
    this.view.spans.forEach((span, at) => (span.dataset.expert = tokens[at][0][0] % COLOURS));
    const bar = (share, expert) =>
      h("li", {}, h("i", { class: "swatch", "data-expert": expert % COLOURS }), `Expert ${expert}`, h("meter", { min: 0, max: Math.max(...mean), value: share }), percent(share));
    this.loads.replaceChildren(...mean.slice(0, 64).map(bar));
    if (count > 64) this.loads.append(h("li", {}, `… and ${count - 64} more`));
    this.point(this.index);
  }

  point(index) {
    this.index = index;
    const chosen = this.layers?.[this.layer]?.tokens[index];
    if (chosen) this.told.textContent = `This token: ${chosen.map(([expert, share]) => `expert ${expert} ${percent(share)}`).join(", ")}`;
  }
}
