/**
 * What stands behind a token, shown beside it while it is pointed at or has the focus.
 *
 * It lies over other tokens, so that a pointer goes through it: it must not keep a reader from the next token. Beside a
 * token with the focus, which a click gives it, it stays and takes the pointer, to be read at leisure.
 */

import { element } from "./dom.js";
import { plain, shortened } from "./state.js";
import { spansOf, tokensOfSpan } from "./reply.js";
import { visible } from "./tokens.js";

/** @typedef {import("./tokens.js").Token} Token */

const GAP = 8;
const GRACE_MS = 150;
/** What OpenAI's format writes for the logarithm of nothing. */
const NOTHING = -9999;
const UNEXPLAINED = "With vLLM, this server does not say what the base and each reward made of it.";

export class Popover {
  /** @type {HTMLElement | null} */
  #anchor = null;
  #leaving = 0;
  #pointer = "";

  /**
   * @param {HTMLElement} box
   * @param {HTMLElement} area the part of the page that holds the replies
   */
  constructor(box, area) {
    this.box = box;
    area.addEventListener("pointerover", (event) => this.#over(event, spanAt(event)));
    area.addEventListener("click", (event) => this.#click(spanAt(event)));
    area.addEventListener("pointerout", (event) => spanAt(event) && this.#leave());
    area.addEventListener("focusin", (event) => this.#focus(spanAt(event)));
    area.addEventListener("focusout", (event) => this.#blur(spanAt(event), event.relatedTarget));
    area.addEventListener("keydown", (event) => walk(event, spanAt(event)));
    box.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    box.addEventListener("focusout", () => this.#leave());
    box.addEventListener("pointerleave", () => this.#leave());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
    area.addEventListener("scroll", () => this.#scrolled(), { capture: true, passive: true });
  }

  hide() {
    clearTimeout(this.#leaving);
    this.#anchor?.classList.remove("inspected");
    this.#anchor = null;
    this.box.hidden = true;
  }

  /**
   * A finger opens it with its tap, not while it is still down: the page may scroll, and lift another token under it.
   * For the same reason a pointer that rests opens nothing.
   * @param {PointerEvent} event
   * @param {HTMLElement | null} span
   */
  #over(event, span) {
    const at = `${event.screenX} ${event.screenY}`;
    if (event.pointerType !== "touch" && at !== this.#pointer) this.#show(span);
    this.#pointer = at;
  }

  /** @param {HTMLElement | null} span */
  #click(span) {
    span?.focus({ preventScroll: true });
    this.#show(span);
  }

  get #kept() {
    return this.#anchor !== null && [this.#anchor, this.box].includes(/** @type {any} */ (document.activeElement));
  }

  /** With the focus it stays beside its token; a pointer's token has gone from under the pointer. */
  #scrolled() {
    if (this.#kept) this.#place();
    else this.hide();
  }

  /** A moment later, so that it does not flicker between two tokens; a token with the focus keeps its own. */
  #leave() {
    clearTimeout(this.#leaving);
    this.#leaving = setTimeout(() => {
      const focused = /** @type {HTMLElement | null} */ (document.querySelector(".token:focus"));
      if (focused) this.#show(focused);
      else this.hide();
    }, GRACE_MS);
  }

  /** @param {HTMLElement | null} span */
  #focus(span) {
    if (!span) return;
    for (const other of spansOf(span.parentElement)) other.tabIndex = other === span ? 0 : -1;
    span.setAttribute("aria-describedby", this.box.id);
    this.#show(span);
  }

  /**
   * @param {HTMLElement | null} span
   * @param {EventTarget | null} to what has the focus now: the popover may have it, to be scrolled with the keys
   */
  #blur(span, to) {
    if (!span) return;
    span.removeAttribute("aria-describedby");
    if (span === this.#anchor && to !== this.box && !this.box.matches(":hover")) this.hide(); // to select what it says
  }

  /** @param {HTMLElement | null} span */
  #show(span) {
    if (!span) return;
    clearTimeout(this.#leaving);
    if (span !== this.#anchor) this.#open(span);
    this.box.classList.toggle("kept", this.#kept);
  }

  /** @param {HTMLElement} span */
  #open(span) {
    this.hide();
    this.#anchor = span;
    span.classList.add("inspected");
    this.box.replaceChildren(...tokensOfSpan(span).map(describe));
    this.box.hidden = false;
    this.#place();
  }

  /** Above the token if there is room, else below it; the style sheet moves it to the bottom of a phone. */
  #place() {
    if (!this.#anchor) return;
    const token = this.#anchor.getClientRects()[0];
    if (!token) return this.hide();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const left = Math.max(GAP, Math.min(token.left, window.innerWidth - width - GAP));
    const above = token.top - height - GAP;
    const below = Math.min(token.bottom + GAP, window.innerHeight - height - GAP);
    this.box.style.setProperty("--left", `${left}px`);
    this.box.style.setProperty("--top", `${above >= GAP ? above : Math.max(GAP, below)}px`);
    const covered = token.bottom + GAP - this.box.getBoundingClientRect().top;
    const sheet = this.box.getBoundingClientRect().bottom >= window.innerHeight;
    if (sheet && covered > 0) this.#anchor.closest(".scroller").scrollBy({ top: covered, behavior: "instant" });
  }
}

/** @param {Event} event */
function spanAt(event) {
  return /** @type {HTMLElement | null} */ (/** @type {Element} */ (event.target).closest(".token"));
}

/**
 * The arrow keys go from token to token.
 * @param {KeyboardEvent} event
 * @param {HTMLElement | null} span
 */
function walk(event, span) {
  if (!span) return;
  const spans = spansOf(span.parentElement);
  const at = spans.indexOf(span);
  const last = spans.length - 1;
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[
    event.key
  ];
  if (to === undefined) return;
  event.preventDefault();
  spans[Math.max(0, Math.min(to, last))].focus();
}

/** @param {Token} token */
function describe(token) {
  return element(
    "div",
    { class: "token-card" },
    element("p", { class: "token-name" }, element("code", {}, visible(token.token) || "(no text)")),
    probabilities(token),
    ...contributions(token),
    ...runnersUp(token),
  );
}

/** @param {Token} token */
function probabilities({ logprob, base }) {
  const known = explained({ base }) ? [probability("Base", base)] : [];
  return element("dl", { class: "pair" }, ...known, probability("Guided", logprob));
}

/**
 * @param {string} name
 * @param {number} logprob
 */
function probability(name, logprob) {
  return element(
    "div",
    {},
    element("dt", {}, name),
    element("dd", {}, percent(logprob)),
    element("dd", { class: "faint" }, nats(logprob)),
  );
}

/**
 * Whether the server said what the base and the rewards make of a token; with vLLM behind it, it cannot.
 * @param {Pick<Token, "base">} token
 */
function explained({ base }) {
  return !Number.isNaN(base);
}

/**
 * One row per reward: its weight times its log-probability is what it adds to the token's score.
 * @param {Token} token
 */
function contributions({ rewards, base }) {
  if (!explained({ base })) return [element("p", { class: "faint" }, UNEXPLAINED)];
  const parts = Object.entries(rewards);
  if (!parts.length) return [element("p", { class: "faint" }, "No reward took part.")];
  const rows = parts.map(([name, { logprob, weight, contribution }]) =>
    row(shortened(name), `${plain(weight)} × ${nats(logprob)}`, nats(contribution)),
  );
  if (parts.length > 1)
    rows.push(row("Sum", "", nats(parts.reduce((sum, [, part]) => sum + (part.contribution ?? -Infinity), 0))));
  return [table(["Reward", "weight × log p", "adds"], rows)];
}

/** @param {Token} token */
function runnersUp({ token, top }) {
  if (!top.length) return [];
  const rows = top.map((candidate) => {
    const bar = element("span", { class: "bar" });
    bar.style.setProperty("--share", String(Math.exp(candidate.logprob)));
    const chosen = candidate.token === token;
    const cells = row(element("code", {}, visible(candidate.token)), bar, percent(candidate.logprob));
    if (chosen) cells.classList.add("chosen");
    if (chosen) cells.firstElementChild.append(element("span", { class: "hidden" }, " (chosen)"));
    return cells;
  });
  return [table(["Likeliest", "", "guided"], rows)];
}

/**
 * @param {string[]} headers
 * @param {HTMLTableRowElement[]} rows
 */
function table(headers, rows) {
  const cells = headers.map((name) => (name ? element("th", { scope: "col" }, name) : element("td")));
  const head = element("tr", {}, ...cells);
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}

/**
 * @param {Node | string} name
 * @param {Node | string} middle
 * @param {string} number
 */
function row(name, middle, number) {
  return element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, middle), element("td", {}, number));
}

/** @param {number | null} value */
function nats(value) {
  if (value === null || value <= NOTHING) return "−∞";
  if (value >= -NOTHING) return "∞"; // a negative weight on what the reward excludes
  return Number.isNaN(value)
    ? "–"
    : value
        .toFixed(2)
        .replace(/^-0\.00$/, "0.00")
        .replace("-", "−");
}

/** @param {number | null} logprob */
function percent(logprob) {
  if (logprob === null || Number.isNaN(logprob)) return "–";
  const share = 100 * Math.exp(logprob);
  if (share < 0.01) return share === 0 ? "0 %" : "< 0.01 %";
  return `${share.toFixed(share < 0.1 ? 2 : 1)} %`;
}
