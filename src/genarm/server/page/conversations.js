/** The list of conversations at the side. */

import { element, quiet } from "./dom.js";

/**
 * @typedef {import("./record.js").Conversation} Conversation
 * @typedef {{open: (id: string) => void, rename: (id: string, title: string) => void, remove: (id: string) => void}} Does
 */

export class ConversationList {
  /**
   * @param {HTMLElement} root
   * @param {Does} does what a reader may do with them
   */
  constructor(root, does) {
    this.root = root;
    this.does = does;
  }

  /**
   * @param {Conversation[]} conversations
   * @param {string} current the id of the one that is open
   */
  show(conversations, current) {
    if (this.root.querySelector("input")) return; // a name is being typed; leaving it shows the list anew
    const held = /** @type {HTMLElement | null} */ (this.root.querySelector(":focus"));
    const key = held?.dataset.key;
    this.root.replaceChildren(...conversations.map((conversation) => this.#item(conversation, current)));
    const again = [...this.root.querySelectorAll("button")].find(({ dataset }) => dataset.key === key);
    if (held) (again ?? this.root.querySelector("button"))?.focus();
  }

  /**
   * @param {Conversation} conversation
   * @param {string} current
   */
  #item({ id, title, updated }, current) {
    const name = element(
      "button",
      {
        type: "button",
        class: "conversation",
        "aria-current": id === current && "true",
        "data-key": `open ${id}`,
        onclick: () => this.does.open(id),
      },
      element("span", { class: "title", dir: "auto" }, title),
      element("span", { class: "faint" }, element("span", { class: "hidden" }, ", "), when(updated)),
    );
    const item = element("li", {}, name);
    const rename = quiet("Rename", () => this.#rename(item, { id, title }), `Rename “${title}”`);
    const remove = quiet("Delete", () => this.does.remove(id), `Delete “${title}”`);
    rename.dataset.key = `rename ${id}`;
    item.append(element("div", { class: "item-actions" }, rename, remove));
    return item;
  }

  /**
   * @param {HTMLElement} item
   * @param {{id: string, title: string}} conversation
   */
  #rename(item, { id, title }) {
    const field = element("input", { "aria-label": "Name of the conversation", maxlength: 200, autocomplete: "off" });
    field.value = title;
    let over = false;
    /** @param {boolean} kept */
    const end = (kept) => {
      if (over) return;
      over = true;
      const focused = document.activeElement === field;
      const button = element("button", { type: "button", "data-key": `rename ${id}` });
      field.replaceWith(button);
      if (focused) button.focus(); // the list hands it on to the button in its place
      this.does.rename(id, (kept && field.value.trim()) || title);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation(); // Escape would close the list as well
      end(event.key === "Enter");
    });
    field.addEventListener("blur", () => end(true));
    item.replaceChildren(field);
    field.select();
  }
}

/** @param {number} time */
function when(time) {
  const [day, today] = [new Date(time), new Date()];
  if (day.toDateString() === today.toDateString()) {
    return day.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit" });
  }
  return day.toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}
