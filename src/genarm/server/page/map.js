/** The map of two rewards: a plane of their weights, on which a trade-off is set by pointing or with the arrow keys. */

import { drawing, element } from "./dom.js";
import { allPresets, plain, sliderRange } from "./state.js";
import { settle, shareOf, stepOf } from "./weights.js";

/**
 * @typedef {import("./api.js").Description} Description
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./state.js").Weights} Weights
 * @typedef {{id: string, minimum: number, maximum: number}} Axis a reward and the part of its range that is shown
 */

const WIDTH = 300;
const HEIGHT = 246;
const LEFT = 48;
const RIGHT = WIDTH - 12;
const TOP = 12;
const BOTTOM = HEIGHT - 40;
const NAME_WIDTH = 70;
const NAME_HEIGHT = 14;
/** How many steps an arrow key goes with Shift. */
const LARGE = 5;

/** @type {Record<string, [number, number]>} */
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };

export class TradeOffMap {
  /** @type {[Axis, Axis]} */
  #axes;
  #points = drawing("g");
  #ground = drawing("g");
  #plane;

  /**
   * @param {HTMLElement} root
   * @param {HTMLElement} choices where the two rewards are chosen, if there are more than two
   * @param {Store} store
   * @param {Description} description of at least two rewards
   */
  constructor(root, choices, store, description) {
    this.store = store;
    this.description = description;
    this.axes = description.data.map((reward) => ({ id: reward.id, ...sliderRange(description, reward) }));
    this.#axes = [this.axes[0], this.axes[1]];
    const picture = drawing(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" },
      this.#ground,
      this.#points,
    );
    this.#plane = element(
      "div",
      {
        class: "map",
        role: "slider",
        tabindex: 0,
        "aria-roledescription": "two-dimensional slider",
        "aria-describedby": "map-hint",
        onkeydown: (/** @type {KeyboardEvent} */ event) => this.#key(event),
        onpointerdown: (/** @type {PointerEvent} */ event) => this.#grab(event),
        onpointermove: (/** @type {PointerEvent} */ event) => this.#drag(event),
      },
      picture,
    );
    root.replaceChildren(this.#plane);
    if (description.data.length > 2) this.#buildChoices(choices);
    this.#drawGround();
    store.watch(["weights", "side", "mode"], () => this.#drawPoints());
  }

  /** @param {HTMLElement} choices */
  #buildChoices(choices) {
    const names = this.axes.map((axis) => axis.id);
    const selects = ["Across", "Up"].map((label, axis) => {
      const select = element("select", { onchange: () => this.#choose(axis, select.value) });
      select.append(...names.map((name) => element("option", { value: name }, name)));
      return { select, whole: element("label", {}, `${label} `, select) };
    });
    this.selects = selects.map(({ select }) => select);
    this.#showChoices();
    choices.replaceChildren(...selects.map(({ whole }) => whole));
    choices.hidden = false;
  }

  /**
   * Put a reward on an axis; if the other axis has it, they change places.
   * @param {number} axis
   * @param {string} name
   */
  #choose(axis, name) {
    const chosen = this.axes.find(({ id }) => id === name);
    if (this.#axes[1 - axis] === chosen) this.#axes.reverse();
    else this.#axes[axis] = chosen;
    this.#showChoices();
    this.#drawGround();
    this.#drawPoints();
  }

  #showChoices() {
    this.selects.forEach((select, axis) => {
      select.value = this.#axes[axis].id;
    });
  }

  /** The frame, its numbers and names, and the presets. */
  #drawGround() {
    const [across, up] = this.#axes;
    this.#ground.replaceChildren(
      drawing("rect", { class: "frame", x: LEFT, y: TOP, width: RIGHT - LEFT, height: BOTTOM - TOP, rx: 4 }),
      ...ticks(across).map((value) =>
        drawing("path", { class: "grid", d: `M${placeX(across, value)} ${TOP}V${BOTTOM}` }),
      ),
      ...ticks(up).map((value) => drawing("path", { class: "grid", d: `M${LEFT} ${placeY(up, value)}H${RIGHT}` })),
      ...ticks(across).map((value) => words(placeX(across, value), BOTTOM + 20, "middle", plain(value))),
      ...ticks(up).map((value) => words(LEFT - 13, placeY(up, value) + 4, "end", plain(value))),
      words((LEFT + RIGHT) / 2, HEIGHT - 4, "middle", `${across.id} →`, "name"),
      drawing(
        "g",
        { transform: `translate(9 ${(TOP + BOTTOM) / 2}) rotate(-90)` },
        words(0, 0, "middle", `${up.id} →`, "name"),
      ),
      ...this.#presets(),
    );
    this.#plane.setAttribute("aria-label", `Trade-off of ${across.id} (across) and ${up.id} (up)`);
    this.#plane.setAttribute("aria-valuemin", String(across.minimum));
    this.#plane.setAttribute("aria-valuemax", String(across.maximum));
  }

  /** The presets as points with their names, of which those that would lie on others are left out. */
  #presets() {
    /** @type {[number, number][]} */
    const named = [];
    return allPresets(this.description).map(({ name, weights }) => {
      const [x, y] = this.#place(weights);
      const mark = drawing(
        "g",
        { class: "preset" },
        drawing("title", {}, name),
        drawing("circle", { cx: x, cy: y, r: 3.5 }),
      );
      const free = named.every(
        ([otherX, otherY]) => Math.abs(otherX - x) > NAME_WIDTH || Math.abs(otherY - y) > NAME_HEIGHT,
      );
      if (!free) return mark;
      named.push([x, y]);
      const left = x > (LEFT + RIGHT) / 2;
      mark.append(words(left ? x - 12 : x + 12, y < TOP + NAME_HEIGHT ? y + 12 : y - 5, left ? "end" : "start", name));
      return mark;
    });
  }

  #drawPoints() {
    const { mode, side, weights } = this.store.value;
    const shown = mode === "compare" ? /** @type {("a" | "b")[]} */ (side === "a" ? ["b", "a"] : ["a", "b"]) : [side];
    this.#points.replaceChildren(
      ...shown.map((key) => {
        const [x, y] = this.#place(weights[key]);
        const mark = drawing("g", {
          class: key === side ? "point active" : "point",
          transform: `translate(${x} ${y})`,
        });
        mark.append(drawing("circle", { r: mode === "compare" ? 10 : 8 }));
        if (mode === "compare") mark.append(words(0, 4, "middle", key.toUpperCase()));
        return mark;
      }),
    );
    const [across, up] = this.#axes;
    const edited = this.store.edited;
    this.#plane.setAttribute("aria-valuenow", String(edited[across.id]));
    this.#plane.setAttribute(
      "aria-valuetext",
      `${across.id} ${plain(edited[across.id])}, ${up.id} ${plain(edited[up.id])}`,
    );
  }

  /** @param {Weights} weights */
  #place(weights) {
    const [across, up] = this.#axes;
    return [placeX(across, weights[across.id]), placeY(up, weights[up.id])];
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const move = KEYS[event.key];
    if (!move) return;
    event.preventDefault();
    const times = event.shiftKey ? LARGE : 1;
    this.#axes.forEach((axis, i) => {
      if (move[i]) this.#set(axis, this.store.edited[axis.id] + times * move[i] * stepOf(axis));
    });
  }

  /** @param {PointerEvent} event */
  #grab(event) {
    if (event.button !== 0) return;
    this.#plane.setPointerCapture(event.pointerId);
    this.#point(event);
  }

  /** @param {PointerEvent} event */
  #drag(event) {
    if (this.#plane.hasPointerCapture(event.pointerId)) this.#point(event);
  }

  /** @param {PointerEvent} event */
  #point(event) {
    const box = this.#plane.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const y = ((event.clientY - box.top) / box.height) * HEIGHT;
    const [across, up] = this.#axes;
    this.#set(across, across.minimum + ((x - LEFT) / (RIGHT - LEFT)) * (across.maximum - across.minimum));
    this.#set(up, up.minimum + ((BOTTOM - y) / (BOTTOM - TOP)) * (up.maximum - up.minimum));
  }

  /**
   * @param {Axis} axis
   * @param {number} value
   */
  #set(axis, value) {
    this.store.edit({ [axis.id]: settle(axis, value) });
  }
}

/**
 * @param {Axis} axis
 * @param {number} value
 */
function placeX(axis, value) {
  return LEFT + shareOf(axis, value) * (RIGHT - LEFT);
}

/**
 * @param {Axis} axis
 * @param {number} value
 */
function placeY(axis, value) {
  return BOTTOM - shareOf(axis, value) * (BOTTOM - TOP);
}

/**
 * Three to six round numbers over an axis.
 * @param {Axis} axis
 */
function ticks({ minimum, maximum }) {
  const step = stepOf({ minimum: 0, maximum: (maximum - minimum) * 20 });
  const first = Math.ceil(minimum / step);
  return Array.from({ length: Math.floor(maximum / step) - first + 1 }, (_, i) => (first + i) * step);
}

/**
 * @param {number} x
 * @param {number} y
 * @param {"start" | "middle" | "end"} anchor
 * @param {string} text
 * @param {string} [kind]
 */
function words(x, y, anchor, text, kind = "") {
  return drawing("text", { x, y, "text-anchor": anchor, class: kind || false }, text);
}
