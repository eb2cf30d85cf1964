/** What is asked of the server, and the same request as something to paste into a terminal or a program. */

/**
 * @typedef {{role: "system" | "user" | "assistant", content: string}} Message
 * @typedef {{temperature: number, top_p: number, max_tokens: number | null, seed: number | null}} Sampling
 * @typedef {{model: string, messages: Message[], temperature: number, top_p: number, max_tokens?: number,
 *   seed: number, reward_weights: Record<string, number>, wishes?: {text: string, weight: number}[],
 *   max_kl?: number}} Request
 */

import { quoted } from "./state.js";

/** How many of the likeliest tokens are shown with each token. */
const RUNNERS_UP = 5;

/**
 * A request that can be repeated: where no seed is set, one is drawn here rather than by the server.
 * @param {string} model
 * @param {Message[]} messages
 * @param {import("./state.js").Steering} steering
 * @param {Sampling} sampling
 * @returns {Request}
 */
export function makeRequest(model, messages, { weights, wishes, max_kl }, sampling) {
  const { temperature, top_p, max_tokens, seed } = sampling;
  const own = wishes.map((text) => ({ text, weight: weights[quoted(text)] }));
  const rewards = Object.entries(weights).filter(([name]) => !wishes.some((text) => quoted(text) === name));
  return {
    model,
    messages,
    temperature,
    top_p,
    ...(max_tokens === null ? {} : { max_tokens }),
    seed: seed ?? Math.floor(Math.random() * 2 ** 31),
    reward_weights: Object.fromEntries(rewards),
    ...(own.length ? { wishes: own } : {}),
    ...(max_kl === null ? {} : { max_kl }),
  };
}

/**
 * The settings that a request had, but for its seed: for another reply of the same kind.
 * @param {Request} request
 * @returns {{steering: import("./state.js").Steering, sampling: Sampling}}
 */
export function settingsOf({ reward_weights, wishes = [], max_kl = null, temperature, top_p, max_tokens = null }) {
  const own = Object.fromEntries(wishes.map(({ text, weight }) => [quoted(text), weight]));
  return {
    steering: { weights: { ...reward_weights, ...own }, wishes: wishes.map(({ text }) => text), max_kl },
    sampling: { temperature, top_p, max_tokens, seed: null },
  };
}

/**
 * @param {string} system the system message, or nothing
 * @returns {Message[]}
 */
export function opening(system) {
  return system ? [{ role: "system", content: system }] : [];
}

/**
 * The request as it is sent: streamed, with all that the page shows about each token.
 * @param {Request} request
 * @param {boolean} explained whether the server can say what the base and each reward make of a token
 */
export function streamed(request, explained) {
  return {
    ...request,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: RUNNERS_UP,
    ...(explained ? { return_rewards: true } : {}),
  };
}

/**
 * @param {Request} request
 * @param {URL} root the API's address
 * @param {boolean} keyed whether the server wants an API key; the key itself is never written out
 */
export function asCurl(request, root, keyed) {
  const lines = [`curl ${shellQuote(new URL("chat/completions", root).href)}`, "-H 'Content-Type: application/json'"];
  if (keyed) lines.push('-H "Authorization: Bearer $GENARM_API_KEY"');
  lines.push(`-d ${shellQuote(JSON.stringify(request, null, 2))}`);
  return `${lines.join(" \\\n  ")}\n`;
}

/**
 * @param {Request} request
 * @param {URL} root the API's address
 * @param {boolean} keyed whether the server wants an API key; the key itself is never written out
 */
export function asPython(request, root, keyed) {
  const { messages, reward_weights, wishes, max_kl, ...options } = request;
  const extra = { reward_weights, ...(wishes ? { wishes } : {}), ...(max_kl === undefined ? {} : { max_kl }) };
  const address = pythonLiteral(root.href.replace(/\/$/, ""));
  const key = keyed ? 'os.environ["GENARM_API_KEY"]' : '"none"';
  return [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${address}, api_key=${key})`,
    "completion = client.chat.completions.create(",
    "    messages=[",
    ...messages.map((message) => `        ${pythonLiteral(message)},`),
    "    ],",
    ...Object.entries(options).map(([name, value]) => `    ${name}=${pythonLiteral(value)},`),
    `    extra_body=${pythonLiteral(extra)},`,
    ")",
    "print(completion.choices[0].message.content)",
    "",
  ].join("\n");
}

/**
 * One word for a POSIX shell, whatever is in it.
 * @param {string} text
 */
export function shellQuote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/**
 * A Python literal of something that JSON can hold. JSON's strings and numbers are Python's as well, escapes included.
 * @param {unknown} value
 * @returns {string}
 */
export function pythonLiteral(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object") {
    const items = Object.entries(value).map(([key, item]) => `${pythonLiteral(key)}: ${pythonLiteral(item)}`);
    return `{${items.join(", ")}}`;
  }
  return JSON.stringify(value);
}
