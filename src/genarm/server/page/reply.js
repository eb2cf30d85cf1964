/** A reply on the page: its text as Markdown and as tokens, a line about how it was made, and what can be done with it. */

import { element } from "./dom.js";
import { Prose } from "./markdown.js";
import { describeSteering, plain } from "./state.js";
import { Aligner, visible } from "./tokens.js";

/**
 * @typedef {import("./tokens.js").Token} Token
 * @typedef {import("./tokens.js").Piece} Piece
 * @typedef {import("./request.js").Request} Request
 * @typedef {"stop" | "length" | "stopped" | "failed"} Ending
 */

/** Of the time, how many times longer than a picture takes nothing is drawn after a slow one. */
const REST = 4;
/** A picture that took so many milliseconds is a slow one. */
const SLOW_MS = 8;

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
  /** How many tokens it has; those of a reply that was kept are not, but their number is. */
  count = 0;
  /** How many nats it went from the base, once the server has said it. @type {number | null} */
  kl = null;
  /** What went wrong, in words. */
  failure = "";
  /** The server's word for that. */
  code = "";
  #aligner = new Aligner();
  #prose = new Prose();
  #body = element("p", { class: "text", dir: "auto" });
  #failure = element("div", { class: "failure" });
  #about = element("p", { class: "faint about" });
  #actions = element("div", { class: "row reply-actions" });
  #drawing = 0;
  /** Before this nothing is drawn, by the page's clock: what took long is not done again at once. */
  #next = 0;

  /**
   * @param {Request} request
   * @param {(span: HTMLElement) => void} paint colours a new token
   */
  constructor(request, paint) {
    this.request = request;
    this.paint = paint;
    this.element = element(
      "div",
      { class: "reply writing" },
      this.#prose.element,
      this.#body,
      this.#failure,
      this.#about,
      this.#actions,
    );
    this.#describe();
  }

  /**
   * @param {string} text
   * @param {Token[]} tokens
   */
  add(text, tokens) {
    this.text += text;
    this.tokens.push(...tokens);
    this.count += tokens.length;
    this.#show(this.#aligner.push(text, tokens));
    this.#drawing ||= requestAnimationFrame(() => this.#draw());
  }

  /**
   * @param {Ending} ending
   * @param {{failure?: string, code?: string}} [why] it failed
   */
  end(ending, { failure = "", code = "" } = {}) {
    Object.assign(this, { ending, failure, code });
    cancelAnimationFrame(this.#drawing);
    this.#prose.show(this.text);
    this.#show(this.#aligner.finish());
    this.element.classList.remove("writing");
    this.#describe();
  }

  /**
   * Bring back one that was kept: its text, without what stood behind the tokens.
   * @param {{text: string, finish_reason: Ending, kl: number | null, count: number, error: string}} kept
   */
  restore({ text, finish_reason, kl, count, error }) {
    Object.assign(this, { text, kl, count });
    this.#body.append(text);
    this.end(finish_reason, { failure: error });
  }

  /** @param {...HTMLElement} actions */
  offer(...actions) {
    this.#actions.replaceChildren(...actions);
  }

  /** @param {...HTMLElement} remedies for what went wrong */
  advise(...remedies) {
    if (this.failure) this.#failure.append(element("div", { class: "row" }, ...remedies));
  }

  /** What an export holds of it. */
  get record() {
    return { request: this.request, ...this.kept, tokens: this.tokens };
  }

  /** What the browser keeps of it, beside its request. */
  get kept() {
    const { text, ending, kl, count, failure } = this;
    return { text, finish_reason: ending ?? "stopped", kl, count, error: failure };
  }

  #draw() {
    this.#drawing = 0;
    if (this.ending) return;
    const began = performance.now();
    if (began < this.#next) {
      this.#drawing = requestAnimationFrame(() => this.#draw());
      return;
    }
    this.#prose.show(this.text);
    const took = performance.now() - began;
    if (took > SLOW_MS) this.#next = began + (1 + REST) * took;
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
    const { count, ending, kl } = this;
    const parts = [describeSteering(this.request)];
    if (ending) parts.push(`${count} token${count === 1 ? "" : "s"}`, `seed ${this.request.seed}`);
    if (ending && kl !== null) parts.push(distance(kl, count));
    if (ending && ENDINGS[ending]) parts.push(ENDINGS[ending]);
    this.#about.replaceChildren(...parts.map((part) => element("span", {}, part)));
    const unknown = ending && count > this.tokens.length;
    if (unknown) this.#about.append(element("span", { class: "unknown" }, "what stood behind its tokens is not kept"));
    this.#failure.replaceChildren(...(this.failure ? [element("p", { role: "alert" }, this.failure)] : []));
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
