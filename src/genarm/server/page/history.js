/**
 * The conversations that this browser keeps, each under a key of its own, so that two windows do not undo each other's
 * work. What cannot be read is passed over and left alone: a newer page may have written it.
 */

import { FORMAT, newId, readConversation, VERSION } from "./record.js";

/** @typedef {import("./record.js").Conversation} Conversation */

const PREFIX = "genarm:conversation:";
const MOST = 100;
/** Browsers give a page about five million. */
const MOST_CHARACTERS = 3_000_000;

export class History {
  /** @type {Map<string, Conversation>} */
  #kept = new Map();
  /** Of those that are in the storage, how long they are. @type {Map<string, number>} */
  #characters = new Map();
  /** @type {Storage | null} */
  #storage = null;

  /**
   * @param {() => void} changed called whenever the list is another
   * @param {(message: string) => void} tell what the reader has to know
   */
  constructor(changed, tell) {
    this.changed = changed;
    this.tell = tell;
    try {
      this.#storage = window.localStorage;
      for (const key of Object.keys(this.#storage)) this.#read(key);
    } catch {
      // The browser keeps nothing for this page: the list is then as long-lived as the page.
    }
    window.addEventListener("storage", ({ key }) => {
      if (key !== null && !key.startsWith(PREFIX)) return;
      if (key === null) this.#kept.clear();
      else this.#read(key);
      changed();
    });
  }

  /** All of them, the latest first. */
  get list() {
    return [...this.#kept.values()].sort((one, other) => other.updated - one.updated);
  }

  /** @param {string} id */
  get(id) {
    return this.#kept.get(id) ?? null;
  }

  /**
   * Keep a conversation. One that another window went on with is kept beside it, as another one.
   * @param {Conversation} conversation
   * @returns {Conversation} as it is kept, with its time and maybe another id
   */
  save(conversation) {
    const there = this.get(conversation.id);
    const id = there && there.updated !== conversation.updated ? newId() : conversation.id;
    const kept = { ...conversation, id, updated: Math.max(Date.now(), conversation.updated + 1) };
    this.put(kept);
    return kept;
  }

  /**
   * Keep a conversation just as it is.
   * @param {Conversation} conversation
   */
  put(conversation) {
    const { id } = conversation;
    const text = JSON.stringify({ format: FORMAT, version: VERSION, ...conversation });
    this.#kept.set(id, conversation);
    let [gone, freed] = [0, 0];
    while (!this.#write(id, text)) {
      const room = freed < 2 * text.length ? this.#forgetOldest(id) : 0; // where more does not help, nothing does
      if (!room) {
        this.tell("The browser has no room to keep this conversation; export it to have it again");
        break;
      }
      [gone, freed] = [gone + 1, freed + room];
    }
    while (this.#tooMuch && this.#forgetOldest(id)) gone += 1;
    if (gone) this.tell(`The oldest ${gone === 1 ? "conversation" : `${gone} conversations`} made room for this one`);
    this.changed();
  }

  /** @param {string} id */
  remove(id) {
    this.#forget(id);
    this.changed();
  }

  get #tooMuch() {
    const characters = [...this.#characters.values()].reduce((sum, one) => sum + one, 0);
    return this.#kept.size > MOST || characters > MOST_CHARACTERS;
  }

  /**
   * @param {string} except
   * @returns {number} how many characters were freed; 0 where there is none to forget
   */
  #forgetOldest(except) {
    const oldest = this.list.findLast(({ id }) => id !== except && this.#characters.has(id));
    if (!oldest) return 0;
    const freed = this.#characters.get(oldest.id);
    this.#forget(oldest.id);
    return freed;
  }

  /** @param {string} id */
  #forget(id) {
    this.#kept.delete(id);
    this.#characters.delete(id);
    this.#storage?.removeItem(PREFIX + id);
  }

  /**
   * @param {string} id
   * @param {string} text
   */
  #write(id, text) {
    try {
      this.#storage?.setItem(PREFIX + id, text);
      this.#characters.set(id, text.length);
      return true;
    } catch {
      return false;
    }
  }

  /** @param {string} key */
  #read(key) {
    if (!key.startsWith(PREFIX)) return;
    const id = key.slice(PREFIX.length);
    this.#kept.delete(id);
    this.#characters.delete(id);
    try {
      const text = this.#storage.getItem(key);
      if (text === null) return;
      this.#kept.set(id, { ...readConversation(JSON.parse(text)), id });
      this.#characters.set(id, text.length);
    } catch {
      // Damaged, or of another version.
    }
  }
}
