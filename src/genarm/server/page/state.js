/** What the settings are, and who wants to know when they change. */

/**
 * @typedef {import("./api.js").Description} Description
 * @typedef {import("./api.js").Reward} Reward
 * @typedef {import("./request.js").Sampling} Sampling
 * @typedef {Record<string, number>} Weights
 * @typedef {"a" | "b"} Side the two settings of a comparison; a chat uses b
 *
 * @typedef {object} Settings
 * @property {"chat" | "compare"} mode
 * @property {Side} side whose weights the panel and the map show
 * @property {Record<Side, Weights>} weights
 * @property {Sampling} sampling
 * @property {boolean} control whether comparisons have the sharpened base beside them
 * @property {string} system the system message, empty for none
 * @property {boolean} heat whether tokens are coloured
 * @property {string} quantity what their colour shows
 * @property {boolean} busy whether a reply is being written
 */

/** Settings that tell their listeners what changed. */
export class Store {
  /** @type {Settings} */
  #value;
  /** @type {{keys: (keyof Settings)[], listener: (settings: Settings) => void}[]} */
  #listeners = [];

  /** @param {Settings} initial */
  constructor(initial) {
    this.#value = Object.freeze({ ...initial });
  }

  get value() {
    return this.#value;
  }

  /** @param {Partial<Settings>} changes */
  set(changes) {
    const before = this.#value;
    this.#value = Object.freeze({ ...before, ...changes });
    for (const { keys, listener } of this.#listeners) {
      if (keys.some((key) => before[key] !== this.#value[key])) listener(this.#value);
    }
  }

  /**
   * Call `listener` now and whenever one of `keys` changes.
   * @param {(keyof Settings)[]} keys
   * @param {(settings: Settings) => void} listener
   */
  watch(keys, listener) {
    this.#listeners.push({ keys, listener });
    listener(this.#value);
  }

  /** The weights that the panel and the map show. */
  get edited() {
    return this.#value.weights[this.#value.side];
  }

  /** @param {Weights} changes to the weights that the panel and the map show */
  edit(changes) {
    const { weights, side } = this.#value;
    this.set({ weights: { ...weights, [side]: { ...weights[side], ...changes } } });
  }
}

/**
 * The settings that a page begins with: the base against the folder's default weights.
 * @param {Description} description
 * @returns {Settings}
 */
export function initialSettings(description) {
  return {
    mode: "chat",
    side: "b",
    weights: { a: noWeights(description), b: defaultWeights(description) },
    sampling: { temperature: 1, top_p: 1, max_tokens: 256, seed: null },
    control: false,
    system: "",
    heat: false,
    quantity: "all",
    busy: false,
  };
}

/**
 * @param {Description} description
 * @returns {Weights}
 */
export function defaultWeights(description) {
  return Object.fromEntries(description.data.map((reward) => [reward.id, reward.default_weight]));
}

/**
 * @param {Description} description
 * @returns {Weights}
 */
export function noWeights(description) {
  return Object.fromEntries(description.data.map((reward) => [reward.id, 0]));
}

/**
 * The weights to choose by name: the folder's defaults, the base alone, and the server's presets over the defaults.
 * @param {Description} description
 * @returns {{name: string, weights: Weights}[]}
 */
export function allPresets(description) {
  const defaults = defaultWeights(description);
  return [
    { name: "Default", weights: defaults },
    { name: "Base", weights: noWeights(description) },
    ...description.presets.map(({ name, weights }) => ({ name, weights: { ...defaults, ...weights } })),
  ];
}

/**
 * The part of a reward's range that a slider covers: from 0 to twice the default (at least 2), and as far as the
 * presets go. What the server allows is mostly far more, and would leave no room to set 0.7; the number field takes it.
 * @param {Description} description
 * @param {Reward} reward
 * @returns {{minimum: number, maximum: number}}
 */
export function sliderRange(description, { id, default_weight, minimum, maximum }) {
  const named = allPresets(description).map(({ weights }) => weights[id]);
  return {
    minimum: Math.max(minimum, Math.min(0, 2 * default_weight, ...named)),
    maximum: Math.min(maximum, Math.max(2, 2 * default_weight, ...named)),
  };
}

/**
 * @param {Weights} one
 * @param {Weights} other
 */
export function sameWeights(one, other) {
  return Object.keys(one).every((name) => one[name] === other[name]);
}

/**
 * Weights in a few words.
 * @param {Weights} weights
 */
export function describeWeights(weights) {
  const named = Object.entries(weights).map(([name, weight]) => `${name} ${plain(weight)}`);
  return Object.values(weights).every((weight) => weight === 0) ? "base, no guidance" : named.join(" · ");
}

/**
 * A number as people write it.
 * @param {number} value
 */
export function plain(value) {
  return String(Number(value.toPrecision(6))).replace("-", "−");
}
