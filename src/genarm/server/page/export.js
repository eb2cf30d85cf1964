/** The conversation as a file. */

import { element } from "./dom.js";

const SAVING_MS = 10_000;

/**
 * @typedef {import("./api.js").Description} Description
 * @typedef {import("./state.js").Settings} Settings
 */

/**
 * All that is needed to read the replies again or to have them written again; the API key is not.
 * @param {Description} description
 * @param {Settings} settings
 * @param {object[]} turns
 * @param {object[]} comparisons
 * @param {Date} now
 */
export function conversationFile(description, settings, turns, comparisons, now) {
  const { weights, wishes, budgets, sampling, system } = settings;
  return {
    format: "genarm-conversation",
    version: 1,
    exported: now.toISOString(),
    model: description.model,
    rewards: description.data,
    settings: { weights, wishes, budgets, sampling, system },
    turns,
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
