/** The conversation as a file, and back. */

import { element } from "./dom.js";
import { FORMAT, newId, readConversation, Unreadable, VERSION } from "./record.js";

const SAVING_MS = 10_000;
const LARGEST_FILE = 50_000_000;

/**
 * @typedef {import("./api.js").Description} Description
 * @typedef {import("./state.js").Settings} Settings
 */

/**
 * All that is needed to read the replies again or to have them written again; the API key is not.
 * @param {Description} description
 * @param {Settings} settings
 * @param {{title: string, left: number, turns: object[]}} conversation
 * @param {object[]} comparisons
 * @param {Date} now
 */
export function conversationFile(description, settings, conversation, comparisons, now) {
  const { weights, wishes, budgets, sampling, system } = settings;
  return {
    format: FORMAT,
    version: VERSION,
    exported: now.toISOString(),
    model: description.model,
    rewards: description.data,
    settings: { weights, wishes, budgets, sampling, system },
    ...conversation,
    comparisons,
  };
}

/**
 * @param {string} name
 * @param {object} content
 */
export function download(name, content) {
  const address = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), SAVING_MS);
}

/**
 * The conversation of a file, as a new one.
 * @param {File} file
 * @throws {Unreadable} it has none; the message is for the reader
 */
export async function importFile(file) {
  try {
    if (file.size > LARGEST_FILE) throw new Unreadable(`it is larger than ${LARGEST_FILE / 1e6} MB`);
    return { ...readConversation(parsed(await file.text())), id: newId(), updated: Date.now() };
  } catch (error) {
    const why = error instanceof Unreadable ? error.message : "the browser cannot read it";
    throw new Unreadable(`cannot import ${file.name}: ${why}`);
  }
}

/** @param {string} text */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Unreadable("it is no JSON");
  }
}
