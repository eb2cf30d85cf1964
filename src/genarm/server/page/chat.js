/** The conversation. */

import { element } from "./dom.js";
import { Announcer } from "./notices.js";
import { makeRequest, opening } from "./request.js";

/**
 * @typedef {import("./write.js").Writer} Writer
 * @typedef {import("./reply.js").Reply} Reply
 * @typedef {import("./request.js").Message} Message
 * @typedef {import("./state.js").Store} Store
 * @typedef {{prompt: string, reply: Reply, element: HTMLElement}} Turn
 */

export class Chat {
  /** @type {Turn[]} */
  #turns = [];

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
    return this.#turns.length === 0;
  }

  /**
   * @param {string} prompt
   * @param {AbortSignal} signal
   */
  async send(prompt, signal) {
    const { system, sampling } = this.store.value;
    const request = makeRequest(this.model, this.#messages(system, prompt), this.store.steering("b"), sampling);
    const reply = this.writer.open(request);
    const turn = { prompt, reply, element: element("article", { class: "turn" }, bubble(prompt), reply.element) };
    for (const earlier of this.#turns) this.writer.offer(earlier.reply, false); // what follows depends on them now
    this.#turns.push(turn);
    this.root.append(turn.element);
    await this.writer.write(reply, signal, new Announcer());
    this.writer.offer(reply, true);
  }

  /** Take the last turn away, and say what its prompt was. */
  takeBack() {
    const turn = this.#turns.pop();
    turn.element.remove();
    return turn.prompt;
  }

  /**
   * Begin anew.
   * @returns {() => void} brings the conversation back
   */
  clear() {
    const turns = this.#turns;
    this.#turns = [];
    this.root.replaceChildren();
    return () => {
      this.#turns = turns;
      this.root.replaceChildren(...turns.map((turn) => turn.element));
    };
  }

  /** What an export holds of it. */
  get record() {
    return this.#turns.map(({ prompt, reply }) => ({ prompt, reply: reply.record }));
  }

  /**
   * The conversation as the model is to see it: as the user saw it, a stopped reply as far as it came. A turn that
   * failed before its first word is left out.
   * @param {string} system
   * @param {string} prompt
   * @returns {Message[]}
   */
  #messages(system, prompt) {
    /** @type {Message[]} */
    const messages = opening(system);
    for (const turn of this.#turns.filter(({ reply }) => reply.text)) {
      messages.push({ role: "user", content: turn.prompt }, { role: "assistant", content: turn.reply.text });
    }
    return [...messages, { role: "user", content: prompt }];
  }
}

/** @param {string} prompt */
export function bubble(prompt) {
  return element("p", { class: "prompt", dir: "auto" }, element("span", { class: "hidden" }, "You: "), prompt);
}
