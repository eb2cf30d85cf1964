/** The rewards' sliders with their number fields, and the presets. */

import { element } from "./dom.js";
import { bindNumber } from "./number.js";
import { allPresets, plain, sameWeights, sliderRange } from "./state.js";

/**
 * @typedef {import("./api.js").Reward} Reward
 * @typedef {import("./api.js").Description} Description
 * @typedef {import("./state.js").Store} Store
 * @typedef {{minimum: number, maximum: number}} Range
 */

const STEPS = 100;

/**
 * A round step that cuts a range into about a hundred.
 * @param {Range} range
 */
export function stepOf({ minimum, maximum }) {
  const raw = (maximum - minimum) / STEPS;
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= raw * (1 - 1e-9));
}

/**
 * `value` on the steps of a range and within it.
 * @param {Range} range
 * @param {number} value
 */
export function settle(range, value) {
  const step = stepOf(range);
  const rounded = Number((Math.round(value / step) * step).toPrecision(12));
  return Math.min(range.maximum, Math.max(range.minimum, rounded));
}

/**
 * Where a value lies in a range, from 0 to 1; what is beyond it lies at its end.
 * @param {Range} range
 * @param {number} value
 */
export function shareOf({ minimum, maximum }, value) {
  return (Math.min(maximum, Math.max(minimum, value)) - minimum) / (maximum - minimum);
}

/**
 * @param {HTMLElement} root
 * @param {Store} store
 * @param {Description} description
 */
export function buildWeights(root, store, description) {
  root.replaceChildren(
    ...description.data.map((reward) => rewardControl(reward, sliderRange(description, reward), store)),
  );
}

/**
 * @param {Reward} reward
 * @param {Range} shown what the slider covers
 * @param {Store} store
 */
function rewardControl(reward, shown, store) {
  const { id, minimum, maximum, default_weight } = reward;
  /** @param {number} value */
  const place = (value) => String(shareOf(shown, value));
  const name = `weight-${id}`;
  const number = element("input", {
    type: "number",
    min: minimum,
    max: maximum,
    step: "any",
    required: true,
    title: `from ${plain(minimum)} to ${plain(maximum)}`,
    "aria-label": `${id}, weight as a number`,
  });
  const range = element("input", {
    type: "range",
    id: name,
    min: shown.minimum,
    max: shown.maximum,
    step: stepOf(shown),
    "aria-describedby": `${name}-about`,
    oninput: () => store.edit({ [id]: settle(shown, range.valueAsNumber) }),
  });
  const slider = element(
    "div",
    { class: "slider" },
    range,
    element("span", { class: "default", "aria-hidden": "true" }),
  );
  slider.style.setProperty("--default", place(default_weight));
  slider.style.setProperty("--zero", place(0));
  const show = bindNumber(number, { read: () => store.edited[id], write: (value) => store.edit({ [id]: value }) });
  store.watch(["weights", "side"], () => {
    const value = store.edited[id];
    range.value = String(value);
    slider.style.setProperty("--value", place(value));
    show();
  });
  return element(
    "div",
    { class: "reward" },
    element("div", { class: "row" }, element("label", { for: name }, id), number),
    slider,
    element(
      "p",
      { class: "faint about", id: `${name}-about` },
      element("span", {}, reward.description ?? ""),
      " ",
      element("span", { class: "range" }, `default ${plain(default_weight)}`),
    ),
  );
}

/**
 * @param {HTMLElement} root
 * @param {Store} store
 * @param {Description} description
 */
export function buildPresets(root, store, description) {
  const presets = allPresets(description);
  const buttons = presets.map(({ name, weights }) =>
    element("button", { type: "button", class: "chip", onclick: () => store.edit(weights) }, name),
  );
  root.replaceChildren(...buttons);
  store.watch(["weights", "side"], () => {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(sameWeights(presets[i].weights, store.edited)));
    });
  });
}
