/** One prompt under two settings, side by side, and the base sharpened as much as B's weights sharpen it. */

import { bubble } from "./chat.js";
import { element } from "./dom.js";
import { announce, toast } from "./notices.js";
import { makeRequest, opening } from "./request.js";
import { describeSteering, plain } from "./state.js";

/**
 * @typedef {import("./write.js").Writer} Writer
 * @typedef {import("./reply.js").Reply} Reply
 * @typedef {import("./request.js").Message} Message
 * @typedef {import("./state.js").Side} Side
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./request.js").Request} Request
 * @typedef {Side | "control"} Column
 * @typedef {{prompt: string, replies: [Column, Reply][], element: HTMLElement}} Comparison
 */

export class Compare {
  /** @type {Comparison[]} */
  #comparisons = [];

  /**
   * @param {HTMLElement} root
   * @param {import("./api.js").Description} description
   * @param {Store} store
   * @param {Writer} writer
   * @param {import("./chat.js").Desk} desk
   */
  constructor(root, description, store, writer, desk) {
    this.root = root;
    this.description = description;
    this.model = description.model;
    this.store = store;
    this.writer = writer;
    this.desk = desk;
  }

  get empty() {
    return this.#comparisons.length === 0;
  }

  /**
   * All replies at once, drawn with one seed.
   * @param {string} prompt
   * @param {AbortSignal} signal
   */
  async send(prompt, signal) {
    const { system, sampling, control } = this.store.value;
    /** @type {Message[]} */
    const messages = [...opening(system), { role: "user", content: prompt }];
    const first = makeRequest(this.model, messages, this.store.steering("a"), sampling);
    const second = makeRequest(this.model, messages, this.store.steering("b"), { ...sampling, seed: first.seed });
    const third = control ? sharpened(second, this.description.data) : null;
    if (control && !third) toast("No sharpened base: that needs a temperature, and weights of B of more than 0 in all");
    /** @type {[Column, Request][]} */
    const asked = [["a", first], ["b", second], ...(third ? [/** @type {[Column, Request]} */ (["control", third])] : [])];
    const replies = asked.map(([side, request]) => /** @type {[Column, Reply]} */ ([side, this.writer.open(request)]));
    const columns = element("div", { class: "columns" }, ...replies.map(([side, reply]) => column(side, reply)));
    const turn = element("article", { class: "turn" }, bubble(prompt), columns);
    const comparison = { prompt, replies, element: turn };
    this.#comparisons.push(comparison);
    this.root.append(turn);
    await Promise.all(
      replies.map(async ([side, reply]) => {
        await this.writer.write(reply, signal);
        this.writer.offer(reply);
        if (reply.failure) reply.advise(this.#retry(comparison));
        // As a whole: two replies that are read out while they come would be mixed.
        if (reply.text) announce(`${NAMES[side]}: ${reply.text}`);
      }),
    );
  }

  /**
   * A button that has a comparison written again, with the present settings.
   * @param {Comparison} comparison
   */
  #retry(comparison) {
    const again = () => {
      if (this.store.value.busy) return toast("A reply is being written; stop it first");
      this.#comparisons = this.#comparisons.filter((other) => other !== comparison);
      comparison.element.remove();
      this.desk.run((signal) => this.send(comparison.prompt, signal));
    };
    return element("button", { type: "button", onclick: again }, "Try again");
  }

  /**
   * Begin anew.
   * @returns {() => void} brings the comparisons back
   */
  clear() {
    const comparisons = this.#comparisons;
    this.#comparisons = [];
    this.root.replaceChildren();
    return () => {
      this.#comparisons = comparisons;
      this.root.replaceChildren(...comparisons.map((comparison) => comparison.element));
    };
  }

  /** What an export holds of it. */
  get record() {
    return this.#comparisons.map(({ prompt, replies }) => ({
      prompt,
      ...Object.fromEntries(replies.map(([side, reply]) => [side, reply.record])),
    }));
  }
}

/** @type {Record<Column, string>} */
const NAMES = { a: "Setting A", b: "Setting B", control: "Sharpened base" };

/**
 * The base alone at the temperature that rewards which learnt nothing (the base itself, with these weights) amount to:
 * T / (1 + Σw), over those that are no differences, which do not sharpen. Null where that is no temperature below T.
 * @param {Request} request
 * @param {import("./api.js").Reward[]} rewards
 * @returns {Request | null}
 */
export function sharpened({ reward_weights, temperature, wishes: _, max_kl: __, ...request }, rewards) {
  const names = Object.keys(reward_weights);
  const differences = new Set(rewards.filter(({ difference }) => difference).map(({ id }) => id));
  const total = names.reduce((sum, name) => sum + (differences.has(name) ? 0 : reward_weights[name]), 0);
  if (total <= 0 || temperature === 0) return null;
  const none = Object.fromEntries(names.map((name) => [name, 0]));
  return { ...request, temperature: temperature / (1 + total), reward_weights: none };
}

/**
 * @param {Column} side
 * @param {Reply} reply
 */
function column(side, reply) {
  const { request } = reply;
  const heading = side === "control" ? sharpenedHeading(request.temperature) : settingHeading(side, request);
  return element("section", { class: "column", "aria-label": NAMES[side] }, heading, reply.element);
}

/**
 * @param {Side} side
 * @param {Request} request
 */
function settingHeading(side, request) {
  return element("h3", {}, element("span", { class: "letter" }, side.toUpperCase()), " ", describeSteering(request));
}

/** @param {number} temperature */
function sharpenedHeading(temperature) {
  return element("h3", {}, `sharpened base, temperature ${plain(temperature)}`);
}
