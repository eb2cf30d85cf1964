/** The server's API, as far as the page needs it. */

import { EventParser } from "./sse.js";

/**
 * @typedef {{id: string, default_weight: number, minimum: number, maximum: number, description: string,
 *   difference: boolean, wish: string | null}} Reward
 * @typedef {{name: string, weights: Record<string, number>, max_kl: number | null}} Preset
 * @typedef {{most: number, characters: number, minimum: number, maximum: number}} WishLimits
 * @typedef {{model: string, data: Reward[], presets: Preset[], return_rewards: boolean,
 *   request_wishes: WishLimits | null}} Description `return_rewards`: whether the server can say what the base and each
 *   reward make of a token; `request_wishes`: which wishes may be typed, if any
 */

/** What the server refused, or that it could not be reached (status 0). */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, code?: string, retryAfter?: number}} [more] `retryAfter` in seconds
   */
  constructor(message, { status = 0, code = "", retryAfter = 0 } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

export class Api {
  /** Sent as a bearer token. It lives here and nowhere else, so it is gone when the page is. */
  key = "";

  /** @param {string} root where the server is, as the browser sees it (it may sit behind a path of a proxy) */
  constructor(root) {
    this.root = new URL("v1/", root);
  }

  /** @returns {Promise<Description>} */
  async rewards() {
    const response = await this.#fetch("rewards", {});
    try {
      return await response.json();
    } catch {
      throw new ApiError(`What answers at ${this.root.origin} is no genarm server. Is there a proxy in between?`);
    }
  }

  /**
   * The chunks of a streamed chat completion.
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<any>}
   */
  async *chat(body, signal) {
    const response = await this.#fetch("chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const data of events(response, signal)) {
      if (data === "[DONE]") return;
      yield chunkOf(data, response.status);
    }
    throw lost();
  }

  /**
   * @param {string} path
   * @param {RequestInit} options
   */
  async #fetch(path, options) {
    const headers = new Headers();
    if (options.body) headers.set("Content-Type", "application/json");
    if (this.key) headers.set("Authorization", `Bearer ${this.key}`);
    let response;
    try {
      response = await fetch(new URL(path, this.root), { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ApiError("The server cannot be reached. Is it running?");
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

/**
 * @param {string} data of one event
 * @param {number} status
 */
function chunkOf(data, status) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw garbled();
  }
  if (chunk?.error) throw new ApiError(chunk.error.message ?? "The server failed in mid-reply", { status });
  if (!Array.isArray(chunk?.choices)) throw garbled();
  return chunk;
}

/**
 * The data of a response's events.
 * @param {Response} response
 * @param {AbortSignal} signal
 */
async function* events(response, signal) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  for (;;) {
    let result;
    try {
      result = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw lost();
    }
    if (result.done) return;
    yield* parser.push(decoder.decode(result.value, { stream: true }));
  }
}

function lost() {
  return new ApiError("The connection was lost in mid-reply. What had arrived is kept; try again to have it whole.");
}

function garbled() {
  return new ApiError(
    "The reply broke off: what came next was damaged on its way. What had arrived is kept; try again to have it whole.",
  );
}

/**
 * The server's own words for why it refused, out of OpenAI's error body.
 * @param {Response} response
 */
async function refusal(response) {
  let [message, code] = ["", ""];
  try {
    ({ message, code } = (await response.json()).error);
  } catch {
    // A proxy's page rather than the server's body: the status has to do.
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  return new ApiError(message || `The server answered with status ${response.status}.`, {
    status: response.status,
    code,
    retryAfter,
  });
}
