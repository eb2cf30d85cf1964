/** The heat map: what a colour can show of a token, on which scale, and its legend. */

import { byId, element } from "./dom.js";
import { plain, quoted, shortened } from "./state.js";
import { spansOf, tokensOfSpan } from "./reply.js";

/**
 * @typedef {import("./tokens.js").Token} Token
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./api.js").Description} Description
 * @typedef {{key: string, label: string, meaning: string, value: (token: Token) => number}} Quantity
 */

const FAINTEST = 0.05;
const LEAST_LIMIT = 1;

/**
 * What can be coloured. A reward's log-probability says little by itself, because what is likely to the base is mostly
 * likely to the reward too; so each is shown against a measure of the ordinary.
 * @param {Description} description
 * @returns {Quantity[]}
 */
export function quantities(description) {
  return [
    {
      key: "all",
      label: "All rewards",
      meaning: "The rewards’ contributions together, less log Z: what guidance added to the token’s log-probability.",
      value: ({ logprob, base }) => logprob - base,
    },
    ...description.data.map(ofReward),
  ];
}

/**
 * @param {Pick<import("./api.js").Reward, "id" | "difference" | "wish">} reward
 * @returns {Quantity}
 */
function ofReward({ id, difference, wish }) {
  const against = wish ? "the base without it" : difference ? "its reference" : "the base";
  return {
    key: `reward ${id}`,
    label: shortened(id),
    meaning: `log π of ${shortened(id)} − log π of ${against}: how much more this reward likes the token, whatever its weight.`,
    value: ({ rewards, base }) => (rewards[id]?.logprob ?? NaN) - (difference ? 0 : base),
  };
}

/**
 * Where the colour is full: the size that nine tokens in ten stay below, at least 1 nat. One token that a model finds
 * absurd would otherwise pale all the others.
 * @param {number[]} values
 */
export function limitOf(values) {
  const sizes = values
    .filter(Number.isFinite)
    .map(Math.abs)
    .sort((one, other) => one - other);
  const tenth = sizes.length ? sizes[Math.ceil(0.9 * sizes.length) - 1] : 0;
  return Math.max(LEAST_LIMIT, Math.ceil(tenth * 10 - 1e-9) / 10);
}

export class HeatMap {
  #limit = LEAST_LIMIT;

  /**
   * @param {Store} store
   * @param {Description} description
   */
  constructor(store, description) {
    this.store = store;
    this.explained = description.return_rewards;
    const select = /** @type {HTMLSelectElement} */ (byId("quantity"));
    store.watch(["wishes"], ({ wishes, quantity }) => {
      const typed = wishes.map((text) => ofReward({ id: quoted(text), difference: true, wish: text }));
      this.quantities = [...quantities(description), ...typed];
      select.replaceChildren(...this.quantities.map(({ key, label }) => element("option", { value: key }, label)));
      if (!this.quantities.some(({ key }) => key === quantity)) store.set({ quantity: this.quantities[0].key });
      select.value = store.value.quantity;
    });
    select.addEventListener("change", () => store.set({ quantity: select.value }));
    byId("heat").addEventListener("change", () => store.set({ heat: !store.value.heat }));
    store.watch(["heat", "quantity"], () => this.repaint());
  }

  /** Colour all tokens anew, on a scale that fits them. */
  repaint() {
    const on = this.store.value.heat;
    const spans = spansOf(document);
    const values = spans.map((span) => this.#value(span));
    this.#limit = limitOf(values);
    /** @type {HTMLInputElement} */ (byId("heat")).checked = on; // some browsers restore what was set before a reload
    document.body.classList.toggle("heated", on);
    byId("heat-tools").hidden = !on || !this.explained;
    spans.forEach((span, i) => this.#colour(span, values[i]));
    this.#showLegend();
  }

  /**
   * Colour one token on the present scale.
   * @param {HTMLElement} span
   */
  paint(span) {
    this.#colour(span, this.#value(span));
  }

  get #quantity() {
    return this.quantities.find(({ key }) => key === this.store.value.quantity);
  }

  /** @param {HTMLElement} span */
  #value(span) {
    return tokensOfSpan(span).reduce((sum, token) => sum + this.#quantity.value(token), 0);
  }

  /**
   * @param {HTMLElement} span
   * @param {number} value
   */
  #colour(span, value) {
    const strength = Number.isNaN(value) || !this.store.value.heat ? 0 : Math.max(-1, Math.min(1, value / this.#limit));
    span.classList.toggle("plus", strength >= FAINTEST);
    span.classList.toggle("minus", strength <= -FAINTEST);
    span.style.setProperty("--strength", String(Math.abs(strength)));
  }

  #showLegend() {
    const limit = plain(this.#limit);
    byId("legend-low").textContent = `≤ −${limit}`;
    byId("legend-high").textContent = `≥ ${limit}`;
    byId("legend").setAttribute(
      "aria-label",
      `From minus ${limit} (less likely: blue, dotted line) to plus ${limit} nats (more likely: orange, solid line)`,
    );
    byId("meaning").textContent = this.#quantity.meaning;
  }
}
