/** The clipboard. */

import { element } from "./dom.js";
import { showError, toast } from "./notices.js";

/**
 * @param {string} text
 * @param {string} done what to say afterwards
 */
export async function copy(text, done) {
  try {
    await write(text);
    toast(done);
  } catch {
    showError("The browser does not let this page write to the clipboard");
  }
}

/**
 * Browsers give pages from plain http no clipboard (this machine's own aside), but still copy what is selected.
 * @param {string} text
 */
async function write(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const before = /** @type {HTMLElement} */ (document.activeElement);
  const field = element("textarea", { class: "hidden", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  before.focus();
  if (!copied) throw new Error("not copied");
}
