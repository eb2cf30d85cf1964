/** The conversation that is open: what was said, said otherwise, said again. */

import { element, quiet } from "./dom.js";
import { Announcer, toast } from "./notices.js";
import { newId, titleOf } from "./record.js";
import { makeRequest, opening, settingsOf } from "./request.js";

/**
 * @typedef {import("./write.js").Writer} Writer
 * @typedef {import("./reply.js").Reply} Reply
 * @typedef {import("./request.js").Message} Message
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./history.js").History} History
 * @typedef {import("./record.js").Conversation} Conversation
 * @typedef {{system: string, steering: import("./state.js").Steering, sampling: import("./request.js").Sampling}} Manner
 * @typedef {object} Turn
 * @property {string} prompt
 * @property {Reply} reply
 * @property {string} system the system message that it had
 * @property {number} first how many of the oldest turns it was written without
 * @property {HTMLElement} element
 * @typedef {{run: (task: (signal: AbortSignal) => Promise<void>) => void, stop: () => void, shown: () => void}} Desk has
 *   one thing written at a time, and is told when other turns are shown
 */

/** How much of the context is left to a reply without a bound of its own, when room is made for it. */
const ROOM = 256;

export class Chat {
  /** @type {Turn[]} */
  #turns = [];
  #about = { id: newId(), title: "", updated: 0, left: 0 };
  #divider = element("p", { class: "divider faint" });

  /**
   * @param {HTMLElement} root
   * @param {string} model
   * @param {Store} store
   * @param {Writer} writer
   * @param {History} history
   * @param {Desk} desk
   */
  constructor(root, model, store, writer, history, desk) {
    this.root = root;
    this.model = model;
    this.store = store;
    this.writer = writer;
    this.history = history;
    this.desk = desk;
  }

  get id() {
    return this.#about.id;
  }

  get empty() {
    return this.#turns.length === 0;
  }

  /**
   * @param {string} prompt
   * @param {AbortSignal} signal
   * @param {Manner} [manner] the present settings, if not given
   */
  async send(prompt, signal, manner = this.#present) {
    const { system, steering, sampling } = manner;
    const request = makeRequest(this.model, this.#messages(this.#turns.length, system, prompt), steering, sampling);
    const turn = this.#add(prompt, this.writer.open(request), system, this.#about.left);
    this.#about.title ||= titleOf(prompt);
    this.keep();
    await this.writer.write(turn.reply, signal, new Announcer());
    this.#offer(turn);
    if (this.#turns.includes(turn)) this.keep();
  }

  /**
   * Begin anew.
   * @returns {() => void} goes back to the conversation that was open
   */
  begin() {
    if (this.store.value.busy) this.keep(); // as far as it has come
    const [about, turns] = [this.#about, this.#turns];
    this.#show({ id: newId(), title: "", updated: 0, left: 0 }, []);
    return () => this.#show({ ...about, ...this.#name(about) }, turns);
  }

  /**
   * Show one that was kept; what stood behind its tokens was not.
   * @param {Conversation} conversation
   */
  open({ turns, ...about }) {
    this.begin();
    this.#show(about, []);
    for (const { prompt, reply: kept } of turns) {
      const messages = this.#messages(this.#turns.length, kept.system, prompt, kept.first);
      const reply = this.writer.open({ ...kept.request, messages });
      reply.restore(kept);
      this.#offer(this.#add(prompt, reply, kept.system, kept.first));
    }
    this.desk.shown();
    this.store.set({ system: this.#turns.at(-1)?.system ?? "" });
  }

  /** Have the browser keep it as it is now. */
  keep() {
    if (this.empty) return;
    const { id, title, updated, left } = { ...this.#about, ...this.#name(this.#about) };
    const turns = this.#turns.map(({ prompt, reply, system, first }) => {
      const { messages: _, ...request } = reply.request;
      return { prompt, reply: { request, system, first, ...reply.kept } };
    });
    const kept = this.history.save({ id, title, updated, left, turns });
    Object.assign(this.#about, { id: kept.id, title: kept.title, updated: kept.updated });
    if (kept.id !== id) this.history.changed(); // another window went on with it, and this is a conversation of its own
  }

  /** What an export holds of it. */
  get record() {
    const { title, left } = { ...this.#about, ...this.#name(this.#about) };
    const turns = this.#turns.map(({ prompt, reply, system, first }) => ({
      prompt,
      reply: { ...reply.record, system, first },
    }));
    return { title, left, turns };
  }

  /** @returns {Manner} */
  get #present() {
    const { system, sampling } = this.store.value;
    return { system, sampling, steering: this.store.steering("b") };
  }

  /**
   * Its name may have been changed in the list.
   * @param {{id: string}} about
   */
  #name({ id }) {
    const kept = this.history.get(id);
    return kept ? { title: kept.title } : {};
  }

  /**
   * @param {{id: string, title: string, updated: number, left: number}} about
   * @param {Turn[]} turns
   */
  #show(about, turns) {
    this.#about = about;
    this.#turns = turns;
    this.root.replaceChildren(...turns.map((turn) => turn.element));
    this.#mark();
    this.desk.shown();
  }

  /**
   * @param {string} prompt
   * @param {Reply} reply
   * @param {string} system
   * @param {number} first
   */
  #add(prompt, reply, system, first) {
    const said = bubble(prompt, quiet("Edit", () => this.#edit(turn, said), "Edit the message, and go on from there"));
    const turn = { prompt, reply, system, first, element: element("article", { class: "turn" }, said, reply.element) };
    this.#turns.push(turn);
    this.root.append(turn.element);
    this.#mark();
    return turn;
  }

  /**
   * What can be done with a reply that is complete, and what to do about one that is not.
   * @param {Turn} turn
   */
  #offer(turn) {
    const { reply, prompt } = turn;
    const again = () => this.#redo(turn, prompt, this.#present);
    const name = "Try again: write this reply again with the present settings";
    if (reply.failure) {
      this.writer.offer(reply);
      const retry = element("button", { type: "button", "aria-label": name, onclick: again }, "Try again");
      reply.advise(...this.#room(turn), retry);
      return;
    }
    const asItWas = () => this.#redo(turn, prompt, { system: turn.system, ...settingsOf(reply.request) });
    this.writer.offer(
      reply,
      quiet("Try again", again, name),
      quiet("Same weights", asItWas, "Same weights: write another reply with the weights that this one had"),
    );
  }

  /**
   * A way on where the context is full.
   * @param {Turn} turn
   * @returns {HTMLElement[]}
   */
  #room(turn) {
    if (turn.reply.code !== "context_length_exceeded") return [];
    const { messages } = turn.reply.request;
    const at = this.#turns.indexOf(turn);
    const earlier = this.#turns
      .slice(turn.first, at)
      .map(({ prompt, reply }) => (reply.text ? prompt.length + reply.text.length : 0));
    const characters = messages.reduce((sum, { content }) => sum + content.length, 0);
    const count = surplus(turn.reply.failure, earlier, characters);
    if (!count) return [];
    const label = count === 1 ? "Leave out the oldest turn" : `Leave out the oldest ${count} turns`;
    const leave = () => this.#redo(turn, turn.prompt, this.#present, turn.first + count);
    return [element("button", { type: "button", onclick: leave }, `${label} and try again`)];
  }

  /**
   * Go on from a turn with another prompt, or another reply; what was said after it goes, and can be brought back.
   * @param {Turn} turn
   * @param {string} prompt
   * @param {Manner} manner
   * @param {number} [left] how many of the oldest turns to leave out from now on
   */
  #redo(turn, prompt, manner, left) {
    if (this.store.value.busy) return toast("A reply is being written; stop it first");
    const at = this.#turns.indexOf(turn);
    const [turns, before] = [this.#turns, { ...this.#about }];
    this.#show({ ...before, left: Math.min(left ?? before.left, at) }, turns.slice(0, at));
    this.desk.run((signal) => this.send(prompt, signal, manner));
    const later = turns.length - at - 1;
    if (!later && !turn.reply.text) return;
    toast(later ? `${later} later turn${later === 1 ? "" : "s"} taken away` : "The reply is written anew", () => {
      this.desk.stop();
      this.#show({ ...this.#about, left: before.left }, turns);
      this.keep();
    });
  }

  /**
   * Make a field of what was said.
   * @param {Turn} turn
   * @param {HTMLElement} said
   */
  #edit(turn, said) {
    if (this.store.value.busy) return toast("A reply is being written; stop it first");
    const field = element("textarea", { "aria-label": "Edited message", dir: "auto" });
    field.value = turn.prompt;
    const back = () => {
      form.replaceWith(said);
      said.querySelector("button").focus();
    };
    const form = element(
      "form",
      { class: "edit" },
      element("h3", { class: "hidden" }, "You"),
      field,
      element(
        "div",
        { class: "row" },
        element("button", { type: "button", onclick: back }, "Cancel"),
        element("button", { type: "submit", class: "primary" }, "Send"),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const prompt = field.value.trim();
      if (!prompt) return field.focus();
      back();
      this.#redo(turn, prompt, this.#present);
      document.getElementById("message").focus();
    });
    sendOnEnter(field, form);
    field.addEventListener("keydown", (event) => event.key === "Escape" && back());
    said.replaceWith(form);
    field.focus();
  }

  /** Say from where on the model reads the conversation. */
  #mark() {
    const { left } = this.#about;
    this.#divider.remove();
    if (!left) return;
    this.#divider.textContent = `The model no longer reads what is above (${left} turn${left === 1 ? "" : "s"})`;
    this.root.insertBefore(this.#divider, this.#turns[left]?.element ?? null);
  }

  /**
   * The conversation as the model is to see it: as the user saw it, a stopped reply as far as it came. A turn that
   * failed before its first word is left out.
   * @param {number} at how many turns were before
   * @param {string} system
   * @param {string} prompt
   * @param {number} [first] how many of them are left out
   * @returns {Message[]}
   */
  #messages(at, system, prompt, first = this.#about.left) {
    /** @type {Message[]} */
    const messages = opening(system);
    for (const turn of this.#turns.slice(first, at).filter(({ reply }) => reply.text)) {
      messages.push({ role: "user", content: turn.prompt }, { role: "assistant", content: turn.reply.text });
    }
    return [...messages, { role: "user", content: prompt }];
  }
}

/**
 * How many of the oldest turns to leave out so that the rest fits, by the numbers of the server's message; 0 where that
 * would not do.
 * @param {string} failure
 * @param {number[]} earlier the characters of each turn before, the oldest first
 * @param {number} characters of all messages
 */
export function surplus(failure, earlier, characters) {
  const [, context, has] = (/context length is (\d+) tokens; .*? has (\d+)/.exec(failure) ?? []).map(Number);
  const [, read] = (/reads up to (\d+)/.exec(failure) ?? []).map(Number); // then it counted characters
  const [, asked] = (/and (\d+) for the reply/.exec(failure) ?? []).map(Number);
  const most = read ?? context;
  if (!most) return earlier.length && 1;
  let over = (has + (asked ?? Math.min(ROOM, most / 4)) - most) * (characters / has);
  return earlier.findIndex((length) => (over -= length) <= 0) + 1;
}

/**
 * What somebody said.
 * @param {string} prompt
 * @param {...HTMLElement} actions
 */
export function bubble(prompt, ...actions) {
  const text = element("p", { class: "prompt", dir: "auto" }, prompt);
  return element("div", { class: "said" }, element("h3", { class: "hidden" }, "You"), text, ...actions);
}

/**
 * Enter sends; with Shift it begins a new line.
 * @param {HTMLTextAreaElement | HTMLInputElement} field
 * @param {HTMLFormElement} form
 */
export function sendOnEnter(field, form) {
  field.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}
