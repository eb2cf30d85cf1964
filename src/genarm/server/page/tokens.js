/** Tokens as the server reports them, and which part of the reply's text each of them wrote. */

import { quoted } from "./state.js";

/**
 * @typedef {{logprob: number | null, weight: number, contribution: number | null}} RewardPart
 * @typedef {{token: string, logprob: number}} Candidate
 * @typedef {object} Token
 * @property {string} token
 * @property {number} logprob the guided model's
 * @property {number} base the frozen base's
 * @property {Record<string, RewardPart>} rewards of those that have a weight
 * @property {Candidate[]} top the likeliest tokens to the guided model, best first
 * @typedef {{text: string, tokens: Token[]}} Piece
 */

/**
 * The tokens of one streamed choice. The request's own wishes, "wish 1" and so on to the server, have their texts as
 * names here: what the first one is changes from request to request.
 * @param {any} choice
 * @param {{text: string}[]} [wishes]
 * @returns {Token[]}
 */
export function tokensOf(choice, wishes = []) {
  const names = Object.fromEntries(wishes.map(({ text }, i) => [`wish ${i + 1}`, quoted(text)]));
  const reported = choice.logprobs?.content ?? [];
  const rewards = choice.rewards ?? [];
  return Array.from({ length: Math.max(reported.length, rewards.length) }, (_, i) => ({
    token: rewards[i]?.token ?? reported[i]?.token ?? "",
    logprob: rewards[i]?.logprob ?? reported[i]?.logprob ?? NaN,
    base: rewards[i]?.base_logprob ?? NaN,
    rewards: Object.fromEntries(
      Object.entries(rewards[i]?.rewards ?? {}).map(([name, part]) => [names[name] ?? name, part]),
    ),
    top: reported[i]?.top_logprobs ?? [],
  }));
}

/**
 * Cuts a reply's text into pieces and says which tokens wrote each of them. Mostly one token wrote one piece. A token
 * without text (half of a character, or held back because a stop string might begin there) joins the next piece.
 */
export class Aligner {
  /** @type {Token[]} */
  #waiting = [];

  /**
   * @param {string} text
   * @param {Token[]} tokens
   * @returns {Piece[]}
   */
  push(text, tokens) {
    this.#waiting.push(...tokens);
    const pieces = [];
    let rest = text;
    while (rest && this.#waiting.length > 1) {
      const length = lengthAtStart(rest, this.#waiting[0].token);
      if (!length) break;
      pieces.push({ text: rest.slice(0, length), tokens: [this.#waiting.shift()] });
      rest = rest.slice(length);
    }
    if (rest) pieces.push({ text: rest, tokens: this.#waiting.splice(0) });
    return pieces;
  }

  /**
   * What is left when the reply has ended: tokens that wrote nothing, such as the end of the turn.
   * @returns {Piece[]}
   */
  finish() {
    return this.#waiting.splice(0).map((token) => ({ text: "", tokens: [token] }));
  }
}

/**
 * How much of `text` is `token`, or 0; a space before a word may belong to either of them.
 * @param {string} text
 * @param {string} token
 */
function lengthAtStart(text, token) {
  const word = token.trimStart();
  if (!word) return text.startsWith(token) ? token.length : 0;
  const spaces = text.length - text.trimStart().length;
  return text.startsWith(word, spaces) ? spaces + word.length : 0;
}

/**
 * A token on one line, with its outer white space and its control characters made visible.
 * @param {string} token
 */
export function visible(token) {
  const shown = token
    .replaceAll("\n", "⏎")
    .replaceAll("\t", "⇥")
    .replace(/[\p{Cc}\p{Cf}]/gu, "�");
  return shown.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}
