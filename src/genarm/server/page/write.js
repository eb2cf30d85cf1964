/** Has the server write a reply, shows it as it comes, and offers what can be done with it. */

import { ApiError } from "./api.js";
import { copy } from "./clipboard.js";
import { quiet } from "./dom.js";
import { explained } from "./notices.js";
import { Reply } from "./reply.js";
import { asCurl, asPython, streamed } from "./request.js";
import { tokensOf } from "./tokens.js";

/**
 * @typedef {import("./api.js").Api} Api
 * @typedef {import("./notices.js").Announcer} Announcer
 * @typedef {import("./reply.js").Ending} Ending
 * @typedef {import("./request.js").Request} Request
 */

export class Writer {
  /**
   * @param {Api} api
   * @param {boolean} explains whether the server can say what the base and each reward make of a token
   * @param {(span: HTMLElement) => void} paint colours a new token
   */
  constructor(api, explains, paint) {
    this.api = api;
    this.explains = explains;
    this.paint = paint;
  }

  /**
   * An empty reply, to be put on the page.
   * @param {Request} request
   */
  open(request) {
    return new Reply(request, this.paint);
  }

  /**
   * Fill the reply. What goes wrong is said where it stands, and what had arrived stays.
   * @param {Reply} reply
   * @param {AbortSignal} signal
   * @param {Announcer} [announcer]
   */
  async write(reply, signal, announcer) {
    try {
      reply.end(await this.#pump(reply, signal, announcer));
    } catch (error) {
      if (signal.aborted) reply.end("stopped");
      else reply.end("failed", { failure: explained(error), code: error instanceof ApiError ? error.code : "" });
    }
    announcer?.end();
  }

  /**
   * @param {Reply} reply
   * @param {AbortSignal} signal
   * @param {Announcer} [announcer]
   * @returns {Promise<Ending>}
   */
  async #pump(reply, signal, announcer) {
    /** @type {Ending} */
    let ending = "stop";
    for await (const chunk of this.api.chat(streamed(reply.request, this.explains), signal)) {
      reply.kl = chunk.usage?.kl ?? reply.kl;
      for (const choice of chunk.choices) {
        const text = choice.delta?.content ?? "";
        reply.add(text, tokensOf(choice, reply.request.wishes));
        announcer?.add(text);
        if (choice.finish_reason) ending = choice.finish_reason;
      }
    }
    return ending;
  }

  /**
   * @param {Reply} reply
   * @param {...HTMLElement} more beside what can be copied
   */
  offer(reply, ...more) {
    const { request, text } = reply;
    const { root, key } = this.api;
    reply.offer(
      ...(text ? [quiet("Copy", () => copy(text, "Reply copied"), "Copy the reply")] : []),
      quiet("curl", () => copy(asCurl(request, root, key !== ""), "curl command copied"), "Copy the request as curl"),
      quiet("Python", () => copy(asPython(request, root, key !== ""), "Python copied"), "Copy the request as Python"),
      ...more,
    );
  }
}
