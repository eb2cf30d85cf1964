/** One prompt under two settings, side by side. */

import { bubble } from "./chat.js";
import { element } from "./dom.js";
import { announce } from "./notices.js";
import { makeRequest, opening } from "./request.js";
import { describeWeights } from "./state.js";

/**
 * @typedef {import("./write.js").Writer} Writer
 * @typedef {import("./reply.js").Reply} Reply
 * @typedef {import("./request.js").Message} Message
 * @typedef {import("./state.js").Side} Side
 * @typedef {import("./state.js").Store} Store
 * @typedef {{prompt: string, replies: Record<Side, Reply>, element: HTMLElement}} Pair
 */

/** @type {Side[]} */
const SIDES = ["a", "b"];

export class Compare {
  /** @type {Pair[]} */
  #pairs = [];

  /**
   * @param {HTMLElement} root
   * @param {string} model
   * @param {Store} store
   * @param {Writer} writer
   */
  constructor(root, model, store, writer) {
    this.root = root;
    this.model = model;
    this.store = store;
    this.writer = writer;
  }

  get empty() {
    return this.#pairs.length === 0;
  }

  /**
   * Both replies at once, drawn with one seed.
   * @param {string} prompt
   * @param {AbortSignal} signal
   */
  async send(prompt, signal) {
    const { system, weights, sampling } = this.store.value;
    /** @type {Message[]} */
    const messages = [...opening(system), { role: "user", content: prompt }];
    const first = makeRequest(this.model, messages, weights.a, sampling);
    const second = makeRequest(this.model, messages, weights.b, { ...sampling, seed: first.seed });
    const replies = { a: this.writer.open(first), b: this.writer.open(second) };
    const columns = element("div", { class: "columns" }, ...SIDES.map((side) => column(side, replies[side])));
    const pair = { prompt, replies, element: element("article", { class: "turn" }, bubble(prompt), columns) };
    this.#pairs.push(pair);
    this.root.append(pair.element);
    await Promise.all(
      SIDES.map(async (side) => {
        await this.writer.write(replies[side], signal);
        this.writer.offer(replies[side], false);
        // As a whole: two replies that are read out while they come would be mixed.
        if (replies[side].text) announce(`Setting ${side.toUpperCase()}: ${replies[side].text}`);
      }),
    );
  }

  /**
   * Begin anew.
   * @returns {() => void} brings the comparisons back
   */
  clear() {
    const pairs = this.#pairs;
    this.#pairs = [];
    this.root.replaceChildren();
    return () => {
      this.#pairs = pairs;
      this.root.replaceChildren(...pairs.map((pair) => pair.element));
    };
  }

  /** What an export holds of it. */
  get record() {
    return this.#pairs.map(({ prompt, replies }) => ({ prompt, a: replies.a.record, b: replies.b.record }));
  }
}

/**
 * @param {Side} side
 * @param {Reply} reply
 */
function column(side, reply) {
  const name = `Setting ${side.toUpperCase()}`;
  const letter = element("span", { class: "letter" }, side.toUpperCase());
  const heading = element("h3", {}, letter, " ", describeWeights(reply.request.reward_weights));
  return element("section", { class: "column", "aria-label": name }, heading, reply.element);
}
