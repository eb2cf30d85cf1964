/** Has the server write a reply, shows it as it comes, and offers what can be done with it. */

import { copy } from "./clipboard.js";
import { element } from "./dom.js";
import { showError } from "./notices.js";
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
   * @param {boolean} explained whether the server can say what the base and each reward make of a token
   * @param {(span: HTMLElement) => void} paint colours a new token
   * @param {() => void} again writes the last reply of the conversation again
   */
  constructor(api, explained, paint, again) {
    this.api = api;
    this.explained = explained;
    this.paint = paint;
    this.again = again;
  }

  /**
   * An empty reply, to be put on the page.
   * @param {Request} request
   */
  open(request) {
    return new Reply(request, this.paint);
  }

  /**
   * Fill the reply. What goes wrong is said in the banner, and what had arrived stays.
   * @param {Reply} reply
   * @param {AbortSignal} signal
   * @param {Announcer} [announcer]
   */
  async write(reply, signal, announcer) {
    try {
      reply.end(await this.#pump(reply, signal, announcer));
    } catch (error) {
      reply.end(signal.aborted ? "stopped" : "failed");
      if (!signal.aborted) showError(error);
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
    for await (const chunk of this.api.chat(streamed(reply.request, this.explained), signal)) {
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
   * @param {boolean} again whether it can be written again
   */
  offer(reply, again) {
    const { request, text } = reply;
    const { root, key } = this.api;
    reply.offer(
      ...(text ? [button("Copy", () => copy(text, "Reply copied"), "Copy the reply")] : []),
      button("curl", () => copy(asCurl(request, root, key !== ""), "curl command copied"), "Copy the request as curl"),
      button("Python", () => copy(asPython(request, root, key !== ""), "Python copied"), "Copy the request as Python"),
      ...(again ? [button("Try again", this.again, "Try again: write this reply again with the present settings")] : []),
    );
  }
}

/**
 * @param {string} label
 * @param {() => void} action
 * @param {string} name what it does, in full
 */
function button(label, action, name) {
  return element("button", { type: "button", class: "quiet", "aria-label": name, onclick: action }, label);
}
