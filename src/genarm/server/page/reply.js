/** A reply on the page: its text as tokens, a line about how it was made, and what can be done with it. */

import { element } from "./dom.js";
import { describeSteering, plain } from "./state.js";
import { Aligner, visible } from "./tokens.js";

/**
 * @typedef {import("./tokens.js").Token} Token
 * @typedef {import("./tokens.js").Piece} Piece
 * @typedef {import("./request.js").Request} Request
 * @typedef {"stop" | "length" | "stopped" | "failed"} Ending
 */

/** @type {WeakMap<Element, Token[]>} */
const written = new WeakMap();

/**
 * The tokens that wrote the text of a span.
 * @param {Element} span
 */
export function tokensOfSpan(span) {
  return written.get(span) ?? [];
}

/**
 * All spans of tokens below `root`, in order.
 * @param {ParentNode} root
 */
export function spansOf(root) {
  return /** @type {HTMLElement[]} */ ([...root.querySelectorAll(".token")]);
}

/** @type {Record<Ending, string>} */
const ENDINGS = { stop: "", length: "cut at the most tokens", stopped: "stopped", failed: "failed" };

export class Reply {
  text = "";
  /** @type {Ending | null} */
  ending = null;
  /** @type {Token[]} */
  tokens = [];
  /** How many nats it went from the base, once the server has said it. @type {number | null} */
  kl = null;
  #aligner = new Aligner();
  #body = element("p", { class: "text", dir: "auto" });
  #about = element("p", { class: "faint about" });
  #actions = element("div", { class: "row reply-actions" });

  /**
   * @param {Request} request
   * @param {(span: HTMLElement) => void} paint colours a new token
   */
  constructor(request, paint) {
    this.request = request;
    this.paint = paint;
    this.element = element("div", { class: "reply writing" }, this.#body, this.#about, this.#actions);
    this.#describe();
  }

  /**
   * @param {string} text
   * @param {Token[]} tokens
   */
  add(text, tokens) {
    this.text += text;
    this.tokens.push(...tokens);
    this.#show(this.#aligner.push(text, tokens));
  }

  /** @param {Ending} ending */
  end(ending) {
    this.ending = ending;
    this.#show(this.#aligner.finish());
    this.element.classList.remove("writing");
    this.#describe();
  }

  /** @param {...HTMLElement} actions */
  offer(...actions) {
    this.#actions.replaceChildren(...actions);
  }

  /** What an export holds of it. */
  get record() {
    return { request: this.request, text: this.text, finish_reason: this.ending, kl: this.kl, tokens: this.tokens };
  }

  /** @param {Piece[]} pieces */
  #show(pieces) {
    for (const { text, tokens } of pieces) {
      if (!tokens.length) {
        this.#body.append(text);
        continue;
      }
      const first = !this.#body.querySelector(".token");
      const space = text.trim() ? text.length - text.trimStart().length : 0; // before a word: stays without colour
      const core = element("span", { class: "core" }, text.slice(space));
      const span = element("span", { class: "token", tabindex: first ? 0 : -1 }, text.slice(0, space), core);
      if (!text) {
        span.classList.add("silent"); // the style sheet writes its name, so that it is no part of the text
        core.dataset.name = visible(tokens[0].token) || "end";
      }
      written.set(span, tokens);
      this.paint(span);
      this.#body.append(span);
    }
  }

  #describe() {
    const { seed } = this.request;
    const count = this.tokens.length;
    const parts = [describeSteering(this.request)];
    if (this.ending) parts.push(`${count} token${count === 1 ? "" : "s"}`, `seed ${seed}`);
    if (this.ending && this.kl !== null) parts.push(distance(this.kl, count));
    if (this.ending && ENDINGS[this.ending]) parts.push(ENDINGS[this.ending]);
    this.#about.replaceChildren(...parts.map((part) => element("span", {}, part)));
  }
}

/**
 * How far a reply went from the base, altogether and for each token.
 * @param {number} kl
 * @param {number} count
 */
function distance(kl, count) {
  const each = count ? ` (${plain(Number((kl / count).toFixed(3)))} a token)` : "";
  return `${plain(Number(kl.toFixed(1)))} nats from the base${each}`;
}
