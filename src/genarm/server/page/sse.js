/**
 * Server-sent events, as the HTML standard reads them; of their fields only `data` means anything to an
 * OpenAI-compatible stream.
 */

/** Turns text that arrives in arbitrary pieces into the data of complete events. */
export class EventParser {
  #rest = "";
  /** @type {string[]} */
  #data = [];

  /**
   * @param {string} text the next piece of the stream
   * @returns {string[]} the data of every event that it completed
   */
  push(text) {
    this.#rest += text;
    const events = [];
    // A carriage return at the very end may be half of "\r\n", so it waits for the next piece.
    const ending = /\r\n|\n|\r(?!$)/g;
    let start = 0;
    for (let found = ending.exec(this.#rest); found; found = ending.exec(this.#rest)) {
      const event = this.#line(this.#rest.slice(start, found.index));
      if (event !== null) events.push(event);
      start = ending.lastIndex;
    }
    this.#rest = this.#rest.slice(start);
    return events;
  }

  /** @param {string} line */
  #line(line) {
    if (line === "") {
      const event = this.#data.length ? this.#data.join("\n") : null;
      this.#data = [];
      return event;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    if (field === "data") this.#data.push(colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, ""));
    return null;
  }
}
