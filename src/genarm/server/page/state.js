/** What the settings are, and who wants to know when they change. */

/**
 * @typedef {import("./api.js").Description} Description
 * @typedef {import("./api.js").Reward} Reward
 * @typedef {import("./request.js").Sampling} Sampling
 * @typedef {Record<string, number>} Weights
 * @typedef {"a" | "b"} Side the two settings of a comparison; a chat uses b
 * @typedef {{weights: Weights, wishes: string[], max_kl: number | null}} Steering one of them, as requests need it
 * @typedef {{name: string, weights: Weights, max_kl: number | null}} Preset
 *
 * @typedef {object} Settings
 * @property {"chat" | "compare"} mode
 * @property {Side} side whose weights the panel and the map show
 * @property {Record<Side, Weights>} weights of the model's rewards, and of typed wishes by their quoted text
 * @property {string[]} wishes the texts that were typed
 * @property {Record<Side, number | null>} budgets the most nats from the base for each token; null sets no bound
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
   * @returns {() => void} ends that
   */
  watch(keys, listener) {
    const entry = { keys, listener };
    this.#listeners.push(entry);
    listener(this.#value);
    return () => {
      this.#listeners = this.#listeners.filter((other) => other !== entry);
    };
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

  /** @param {number | null} max_kl of the setting that the panel shows */
  bound(max_kl) {
    const { budgets, side } = this.#value;
    this.set({ budgets: { ...budgets, [side]: max_kl } });
  }

  /**
   * Have a typed wish, with weight 1 in the setting that the panel shows and 0 in the other.
   * @param {string} text
   */
  wish(text) {
    const { weights, side, wishes } = this.#value;
    const [name, other] = [quoted(text), side === "a" ? "b" : "a"];
    const both = { [side]: { ...weights[side], [name]: 1 }, [other]: { ...weights[other], [name]: 0 } };
    this.set({ weights: /** @type {Record<Side, Weights>} */ (both), wishes: [...wishes, text] });
  }

  /** @param {string} text */
  unwish(text) {
    const { weights, wishes } = this.#value;
    /** @param {Weights} all */
    const without = ({ [quoted(text)]: _, ...others }) => others;
    this.set({
      weights: { a: without(weights.a), b: without(weights.b) },
      wishes: wishes.filter((other) => other !== text),
    });
  }

  /**
   * One of the two settings, whole.
   * @param {Side} side
   * @returns {Steering}
   */
  steering(side) {
    const { weights, wishes, budgets } = this.#value;
    return { weights: weights[side], wishes, max_kl: budgets[side] };
  }
}

/**
 * What a typed wish is called among the weights; no reward can have this name.
 * @param {string} text
 */
export function quoted(text) {
  return `“${text}”`;
}

const BASE = "Base";

/**
 * What choosing a preset sets: typed wishes stay as they are, but for the base alone, which has none.
 * @param {Preset} preset
 * @param {string[]} wishes
 * @returns {Weights}
 */
export function weightsOf({ name, weights }, wishes) {
  if (name !== BASE) return weights;
  return { ...weights, ...Object.fromEntries(wishes.map((text) => [quoted(text), 0])) };
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
    wishes: [],
    budgets: { a: null, b: null },
    sampling: { temperature: 0.7, top_p: 0.9, max_tokens: 256, seed: null }, // at 1 and 1 small models ramble
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
 * The settings to choose by name: the folder's defaults, the base alone, and the server's presets over the defaults.
 * @param {Description} description
 * @returns {Preset[]}
 */
export function allPresets(description) {
  const defaults = defaultWeights(description);
  return [
    { name: "Default", weights: defaults, max_kl: null },
    { name: BASE, weights: noWeights(description), max_kl: null },
    ...description.presets.map(({ name, weights, max_kl }) => ({ name, weights: { ...defaults, ...weights }, max_kl })),
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
  // Presets say nothing of typed wishes.
  const named = allPresets(description).map(({ weights }) => weights[id] ?? default_weight);
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

const LONGEST_NAME = 40;

/**
 * What a request is steered by, in a few words.
 * @param {Pick<import("./request.js").Request, "reward_weights" | "wishes" | "max_kl">} request
 */
export function describeSteering({ reward_weights, wishes = [], max_kl }) {
  const all = [...Object.entries(reward_weights), ...wishes.map(({ text, weight }) => [quoted(text), weight])];
  if (all.every(([, weight]) => weight === 0)) return "base, no guidance";
  const named = all.map(([name, weight]) => `${shortened(String(name))} ${plain(Number(weight))}`);
  return [...named, ...(max_kl === undefined ? [] : [`at most ${plain(max_kl)} nats a token`])].join(" · ");
}

/**
 * A name that may be a whole wish, on one line.
 * @param {string} name
 */
export function shortened(name) {
  return name.length > LONGEST_NAME ? `${name.slice(0, LONGEST_NAME - 2).trimEnd()}…”` : name;
}

/**
 * A number as people write it.
 * @param {number} value
 */
export function plain(value) {
  return String(Number(value.toPrecision(6))).replace("-", "−");
}
