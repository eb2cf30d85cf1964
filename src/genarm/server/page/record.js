/** A conversation as it is kept and exported, and reading one that anybody may have written. */

export const FORMAT = "genarm-conversation";
export const VERSION = 1;

const MOST_TURNS = 2000;
const LONGEST_TEXT = 1_000_000;
const LONGEST_TITLE = 200;

/**
 * @typedef {import("./request.js").Request} Request
 * @typedef {import("./reply.js").Ending} Ending
 * @typedef {object} KeptReply
 * @property {Omit<Request, "messages">} request the messages are those of the turns before it
 * @property {string} system the system message that it had
 * @property {number} first how many of the oldest turns it was written without
 * @property {string} text
 * @property {Ending} finish_reason
 * @property {number | null} kl
 * @property {number} count of its tokens
 * @property {string} error what went wrong, in words
 * @typedef {{prompt: string, reply: KeptReply}} KeptTurn
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {number} updated when something was last said, in ms
 * @property {number} left how many of the oldest turns are no longer sent
 * @property {KeptTurn[]} turns
 */

/** Something else than a conversation, or one of a version that this page does not know. */
export class Unreadable extends Error {}

/** A name that no other conversation has; `crypto.randomUUID` is not there on plain http. */
export function newId() {
  return `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`;
}

/**
 * What a conversation is called until somebody names it.
 * @param {string} prompt
 */
export function titleOf(prompt) {
  const line = prompt.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

/**
 * What `value` says, all of it checked; whatever else it has is left out.
 * @param {any} value
 * @returns {Conversation}
 * @throws {Unreadable} it is no conversation
 */
export function readConversation(value) {
  if (value?.format !== FORMAT) throw new Unreadable("it is no conversation exported from this page");
  if (value.version !== VERSION) {
    throw new Unreadable(`it is of version ${String(value.version).slice(0, 20)}, and this page reads version ${VERSION}`);
  }
  const turns = list(value.turns, "turns", MOST_TURNS).map((turn, i) => readTurn(turn, `turns[${i}]`));
  if (!turns.length) throw new Unreadable("it has no turns of a chat");
  return {
    id: typeof value.id === "string" && /^[\w-]{1,40}$/.test(value.id) ? value.id : newId(),
    title: text(value.title ?? titleOf(turns[0].prompt), "title", LONGEST_TITLE) || "Untitled",
    updated: number(value.updated ?? Date.now(), "updated"),
    left: Math.min(turns.length, whole(value.left ?? 0, "left")),
    turns,
  };
}

/**
 * @param {any} turn
 * @param {string} where
 * @returns {KeptTurn}
 */
function readTurn(turn, where) {
  const reply = fields(turn?.reply, `${where}.reply`);
  const { request, kl = null } = reply;
  const first = request?.messages?.[0];
  const exported = first?.role === "system" ? first.content : "";
  const known = ["stop", "length", "stopped", "failed"].includes(reply.finish_reason);
  return {
    prompt: text(turn.prompt, `${where}.prompt`),
    reply: {
      request: readRequest(request, `${where}.reply.request`),
      system: text(reply.system ?? exported, `${where}.reply.system`),
      first: whole(reply.first ?? 0, `${where}.reply.first`),
      text: text(reply.text, `${where}.reply.text`),
      finish_reason: known ? reply.finish_reason : "stopped", // the page was closed while it was written
      kl: kl === null ? null : number(kl, `${where}.reply.kl`),
      count: whole(reply.count ?? reply.tokens?.length ?? 0, `${where}.reply.count`),
      error: text(reply.error ?? "", `${where}.reply.error`),
    },
  };
}

/**
 * @param {any} request
 * @param {string} where
 * @returns {Omit<Request, "messages">}
 */
function readRequest(request, where) {
  const { model, temperature, top_p, seed, max_tokens, max_kl, wishes } = fields(request, where);
  const weights = Object.entries(fields(request.reward_weights, `${where}.reward_weights`));
  return {
    model: text(model, `${where}.model`),
    temperature: number(temperature, `${where}.temperature`),
    top_p: number(top_p, `${where}.top_p`),
    ...(max_tokens === undefined ? {} : { max_tokens: whole(max_tokens, `${where}.max_tokens`) }),
    seed: whole(seed, `${where}.seed`),
    reward_weights: Object.fromEntries(weights.map(([name, weight]) => [name, number(weight, `${where}.reward_weights`)])),
    ...(wishes === undefined ? {} : { wishes: list(wishes, `${where}.wishes`, 100).map((wish) => readWish(wish, where)) }),
    ...(max_kl === undefined ? {} : { max_kl: number(max_kl, `${where}.max_kl`) }),
  };
}

/**
 * @param {any} wish
 * @param {string} where
 */
function readWish(wish, where) {
  return { text: text(wish?.text, `${where}.wishes`), weight: number(wish.weight, `${where}.wishes`) };
}

/**
 * @param {unknown} value
 * @param {string} where
 * @returns {any}
 */
function fields(value, where) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw wrong(where, "an object");
  return value;
}

/**
 * @param {unknown} value
 * @param {string} where
 * @param {number} most
 * @returns {any[]}
 */
function list(value, where, most) {
  if (!Array.isArray(value) || value.length > most) throw wrong(where, `a list of up to ${most}`);
  return value;
}

/**
 * @param {unknown} value
 * @param {string} where
 */
function text(value, where, longest = LONGEST_TEXT) {
  if (typeof value !== "string" || value.length > longest) throw wrong(where, `a text of up to ${longest} characters`);
  return value;
}

/**
 * @param {unknown} value
 * @param {string} where
 */
function number(value, where) {
  if (typeof value !== "number" || !Number.isFinite(value)) throw wrong(where, "a number");
  return value;
}

/**
 * @param {unknown} value
 * @param {string} where
 */
function whole(value, where) {
  if (!Number.isInteger(value) || /** @type {number} */ (value) < 0) throw wrong(where, "a whole number");
  return /** @type {number} */ (value);
}

/**
 * @param {string} where
 * @param {string} what
 */
function wrong(where, what) {
  return new Unreadable(`its ${where} is not ${what}`);
}
