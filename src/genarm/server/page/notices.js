/** How the page speaks up: the banner for what went wrong, a toast for what was done, words for screen readers. */

import { ApiError } from "./api.js";
import { byId, element } from "./dom.js";

const TOAST_MS = 6000;
const UNDO_MS = 12_000;
const UNAUTHORISED = 401;
const MANY_REQUESTS = 429;

/** @type {ReturnType<typeof setTimeout>} */
let fading;
let undoable = false;

/**
 * Say what went wrong with the page as a whole; a reply's errors stand where the reply does.
 * @param {string} message
 */
export function showError(message) {
  const banner = byId("banner");
  banner.replaceChildren(
    element("p", {}, sentence(message)),
    element("button", { type: "button", onclick: hideError }, "Dismiss"),
  );
  banner.hidden = false;
}

/**
 * What went wrong, in the server's words. What is no error of the API's is a mistake in what was received.
 * @param {unknown} error
 */
export function explained(error) {
  const known = error instanceof ApiError;
  if (!known) console.error(error);
  const message = known ? error.message : "The page cannot make sense of what it received. Reload it and try again";
  return [message, ...advice(error)].map(sentence).join(" ");
}

export function hideError() {
  byId("banner").hidden = true;
}

/** @param {unknown} error */
function advice(error) {
  if (!(error instanceof ApiError)) return [];
  if (error.status === UNAUTHORISED) return ["Enter the API key under Connection in the settings."];
  if (error.status === MANY_REQUESTS && error.retryAfter) return [`Try again in ${error.retryAfter} s.`];
  return [];
}

/** @param {string} message */
function sentence(message) {
  return `${message.charAt(0).toUpperCase()}${message.slice(1)}${/[.!?]$/.test(message) ? "" : "."}`;
}

/**
 * Say what was done, with a way back if there is one.
 * @param {string} message
 * @param {() => void} [undo]
 */
export function toast(message, undo) {
  const box = byId("toast");
  undoable = undo !== undefined;
  box.replaceChildren(element("span", {}, message));
  if (undo) {
    const back = () => {
      hideToast();
      undo();
    };
    box.append(element("button", { type: "button", onclick: back }, "Undo"));
  }
  clearTimeout(fading);
  fading = setTimeout(hideToast, undo ? UNDO_MS : TOAST_MS);
}

function hideToast() {
  byId("toast").replaceChildren();
}

/** When something new begins, an undo would come too late. */
export function hideUndo() {
  if (undoable) hideToast();
}

/** Reads a reply to screen readers sentence by sentence: token by token they would never finish a word. */
export class Announcer {
  #unsaid = "";

  /** @param {string} text */
  add(text) {
    this.#unsaid += text;
    const end = this.#unsaid.search(/[.!?…。！？]\s|\n/);
    if (end < 0) return;
    announce(this.#unsaid.slice(0, end + 1));
    this.#unsaid = this.#unsaid.slice(end + 1);
  }

  end() {
    announce(this.#unsaid);
    this.#unsaid = "";
  }
}

/**
 * @param {string} text
 */
export function announce(text) {
  if (!text.trim()) return;
  const live = byId("live");
  live.append(element("p", {}, text.trim()));
  while (live.childElementCount > 20) live.firstElementChild.remove();
}
