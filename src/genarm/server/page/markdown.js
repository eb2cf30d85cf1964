/**
 * Markdown as elements of the page. The parser says what is what; the elements are made here, of the few kinds that are
 * named below. Nothing is ever read as HTML, so there is no markup that a reply could smuggle in.
 */

import { copy } from "./clipboard.js";
import { element } from "./dom.js";
import { mend } from "./mend.js";
import markdownIt from "./vendor/markdown-it.min.js";

/**
 * @typedef {{type: string, tag: string, hidden: boolean, content: string, info: string, nesting: number, level: number,
 *   map: [number, number] | null, children: Token[] | null, attrGet: (name: string) => string | null}} Token of the parser
 * @typedef {{line: number, end: number, tokens: Token[]}} Block at the top level, with its first line and the one after it
 */

/** How deep lists and quotations may be nested; the parser would leave out what is deeper. */
const DEEPEST = 40;
/** The most characters of one paragraph that are searched for emphasis, links and the like. */
const LONGEST_PARAGRAPH = 20_000;
/** The most characters of a reply that are read as Markdown at all. */
const LONGEST = 1_000_000;

/** What a token that opens something becomes; anything else leaves only its text. */
const ELEMENTS = {
  paragraph_open: "p",
  blockquote_open: "blockquote",
  bullet_list_open: "ul",
  ordered_list_open: "ol",
  list_item_open: "li",
  table_open: "table",
  thead_open: "thead",
  tbody_open: "tbody",
  tr_open: "tr",
  th_open: "th",
  td_open: "td",
  em_open: "em",
  strong_open: "strong",
  s_open: "s",
};

const parser = makeParser();

function makeParser() {
  const made = markdownIt({ html: false, linkify: true, breaks: true, maxNesting: DEEPEST });
  // Definitions of links stand anywhere, so that no part of a text could be read by itself.
  made.disable("reference");
  made.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
  made.validateLink = (/** @type {string} */ address) => webAddress(address) !== null;
  made.core.ruler.at("inline", (/** @type {any} */ state) => {
    for (const token of state.tokens.filter((/** @type {Token} */ one) => one.type === "inline")) {
      if (token.content.length > LONGEST_PARAGRAPH) continue;
      state.md.inline.parse(token.content, state.md, state.env, token.children);
    }
  });
  return made;
}

/** @param {string} address */
function webAddress(address) {
  return /^https?:\/\//i.test(address) && URL.canParse(address) ? new URL(address).href : null;
}

/** A text that grows, shown as Markdown; what cannot change any more is neither read nor made again. */
export class Prose {
  /** How many characters, and how many elements, are as they will be. */
  #settled = { characters: 0, elements: 0 };

  constructor() {
    this.element = element("div", { class: "prose", dir: "auto", onclick: copyCode });
  }

  /** @param {string} text all of it; what was shown before is its beginning */
  show(text) {
    const source = text.replace(/\r\n?/g, "\n");
    const rest = source.slice(this.#settled.characters);
    const lines = rest.split("\n");
    const blocks = source.length > LONGEST ? [{ line: 0, end: lines.length, tokens: null }] : blocksOf(rest);
    const made = blocks.map((block) => built(block, lines));
    mend(this.element, this.#settled.elements, made);
    // A block is over once the next one has begun, which only a whole line shows: "*" may become "**so**".
    const last = blocks.findLastIndex(({ line }) => line + 1 < lines.length);
    if (last <= 0) return;
    this.#settled.characters += lines.slice(0, blocks[last].line).reduce((sum, line) => sum + line.length + 1, 0);
    this.#settled.elements += last;
  }
}

/**
 * The parts of a text that can be shown one by one.
 * @param {string} source
 * @returns {Block[]}
 */
function blocksOf(source) {
  /** @type {Block[]} */
  const blocks = [];
  for (const token of /** @type {Token[]} */ (parser.parse(source, {}))) {
    if (token.level === 0 && token.nesting >= 0 && token.map) {
      blocks.push({ line: token.map[0], end: token.map[1], tokens: [] });
    }
    blocks.at(-1)?.tokens.push(token);
  }
  return blocks;
}

/**
 * One element for one block; what is nested too deep, and what is too long, is shown as it was written.
 * @param {{line: number, end: number, tokens: Token[] | null}} block
 * @param {string[]} lines
 */
function built({ line, end, tokens }, lines) {
  if (tokens === null || tokens.some(({ level }) => level >= DEEPEST - 1)) {
    return element("p", { class: "as-written" }, lines.slice(line, end).join("\n"));
  }
  const root = document.createDocumentFragment();
  build(tokens, root);
  return /** @type {Element} */ (root.firstChild);
}

/**
 * @param {Token[]} tokens
 * @param {Node} root
 */
function build(tokens, root) {
  const around = [root];
  for (const token of tokens) {
    const at = around.at(-1);
    if (token.nesting < 0) around.pop();
    else if (token.nesting === 0) leaf(token, at);
    else if (token.hidden) around.push(at); // a paragraph of a list without empty lines
    else {
      const node = opened(token);
      at.appendChild(node);
      around.push(node.querySelector("table") ?? node);
    }
  }
}

/** @param {Token} token */
function opened(token) {
  const tag = ELEMENTS[token.type];
  if (token.type === "heading_open") return element("h4", { class: `size-${token.tag.slice(1)}` });
  if (token.type === "link_open") return link(token.attrGet("href"));
  if (tag === "table") {
    return element("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Table" }, element("table"));
  }
  if (tag === "ol") return element("ol", { start: token.attrGet("start") ?? undefined });
  if (tag === "th" || tag === "td") {
    const [, side] = /text-align:(\w+)/.exec(token.attrGet("style") ?? "") ?? [];
    return element(tag, { class: side && `to-${side}` });
  }
  return element(tag ?? "span");
}

/**
 * @param {Token} token without children of its own, or a line of them
 * @param {Node} at
 */
function leaf(token, at) {
  if (token.type === "inline" && token.children.length) build(token.children, at);
  else if (token.type === "softbreak" || token.type === "hardbreak") at.appendChild(element("br"));
  else if (token.type === "hr") at.appendChild(element("hr"));
  else if (token.type === "code_inline") at.appendChild(element("code", {}, token.content));
  else if (token.type === "fence" || token.type === "code_block") at.appendChild(code(token));
  else if (token.type === "image") at.appendChild(link(token.attrGet("src"), token.content || "Image"));
  else at.appendChild(document.createTextNode(token.content));
}

/**
 * @param {string} address
 * @param {...string} said
 */
function link(address, ...said) {
  const href = webAddress(address);
  if (href === null) return element("span", {}, ...said);
  return element("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...said);
}

/** @param {Token} token */
function code({ info, content }) {
  const [language] = info.trim().split(/\s+/);
  const says = language ? `Code, ${language}` : "Code";
  return element(
    "div",
    { class: "code" },
    element(
      "div",
      { class: "row code-head" },
      element("span", { class: "faint" }, language),
      element("button", { type: "button", class: "quiet copy-code", "aria-label": "Copy the code" }, "Copy"),
    ),
    element("pre", { tabindex: 0, role: "group", "aria-label": says }, element("code", {}, content.replace(/\n$/, ""))),
  );
}

/** @param {MouseEvent} event */
function copyCode({ target }) {
  const button = /** @type {Element} */ (target).closest(".copy-code");
  if (button) copy(button.closest(".code").querySelector("pre").textContent, "Code copied");
}
