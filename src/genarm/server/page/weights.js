/** The rewards' sliders with their number fields, and the presets. */

import { element } from "./dom.js";
import { bindNumber } from "./number.js";
import { allPresets, plain, quoted, sameWeights, sliderRange, weightsOf } from "./state.js";
import { toast } from "./notices.js";

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
    ...description.data.map((reward) => rewardControl(reward, sliderRange(description, reward), store).root),
  );
}

/**
 * @param {Reward} reward
 * @param {Range} shown what the slider covers
 * @param {Store} store
 * @param {() => void} [remove] for a typed wish
 * @returns {{root: HTMLElement, end: () => void}} `end` when it is removed
 */
function rewardControl(reward, shown, store, remove) {
  const { id, minimum, maximum, default_weight } = reward;
  /** @param {number} value */
  const place = (value) => String(shareOf(shown, value));
  const name = remove ? `wish-${(typed += 1)}` : `weight-${id}`;
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
  const end = store.watch(["weights", "side"], () => {
    const value = store.edited[id];
    range.value = String(value);
    slider.style.setProperty("--value", place(value));
    show();
  });
  const root = element(
    "div",
    { class: "reward" },
    element("div", { class: "row" }, element("label", { for: name }, id), number),
    slider,
    element(
      "p",
      { class: "faint about", id: `${name}-about` },
      element("span", {}, aboutReward(reward)),
      " ",
      remove
        ? element("button", { type: "button", class: "quiet", "aria-label": `Remove ${id}`, onclick: remove }, "Remove")
        : element("span", { class: "range" }, `default ${plain(default_weight)}`),
    ),
  );
  return { root, end };
}

/** How many wishes were typed. */
let typed = 0;

/** @param {Reward} reward */
function aboutReward({ id, description, wish }) {
  if (wish === null || quoted(wish) === id) return description;
  return [description, quoted(wish)].filter(Boolean).join(" ");
}

/**
 * The line that makes a slider of what is typed.
 * @param {HTMLElement} root for the sliders
 * @param {HTMLFormElement} form with the line and its button
 * @param {Store} store
 * @param {Description} description of a server that takes wishes
 */
export function buildWishes(root, form, store, description) {
  const { most, characters, minimum, maximum } = description.request_wishes;
  const line = form.querySelector("input");
  const button = form.querySelector("button");
  const reward = { description: "your wish", default_weight: 1, minimum, maximum, difference: true };
  /** @type {Map<string, {root: HTMLElement, end: () => void}>} */
  const controls = new Map();
  form.hidden = false;
  line.maxLength = characters;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = line.value.trim();
    if (!text) return line.focus();
    if (store.value.wishes.includes(text)) return toast("That wish is there already");
    line.value = "";
    store.wish(text);
    controls.get(text).root.querySelector("input[type=range]").focus();
  });
  /** @param {string} text */
  const remove = (text) => {
    controls.get(text).end();
    store.unwish(text);
    line.focus();
  };
  store.watch(["wishes"], ({ wishes }) => {
    for (const text of wishes.filter((one) => !controls.has(one))) {
      const own = { ...reward, id: quoted(text), wish: text };
      controls.set(text, rewardControl(own, sliderRange(description, own), store, () => remove(text)));
    }
    for (const text of [...controls.keys()].filter((one) => !wishes.includes(one))) controls.delete(text);
    root.replaceChildren(...[...controls.values()].map((control) => control.root));
    line.disabled = button.disabled = wishes.length >= most;
    line.placeholder = line.disabled ? `${most} wishes are the most` : "Answer in rhyme";
  });
}

const BOUNDS = [0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5];

/**
 * The dial for the most nats that a token may be from the base; at its end there is no bound.
 * @param {HTMLInputElement} dial
 * @param {HTMLElement} says what it stands at
 * @param {Store} store
 * @param {Description} description
 */
export function buildDial(dial, says, store, description) {
  const named = description.presets.map(({ max_kl }) => max_kl).filter((bound) => bound !== null);
  const bounds = [...new Set([...BOUNDS, ...named])].sort((one, other) => one - other);
  dial.max = String(bounds.length);
  dial.addEventListener("input", () => store.bound(bounds[dial.valueAsNumber] ?? null));
  store.watch(["budgets", "side"], ({ budgets, side }) => {
    const bound = budgets[side];
    const at = bound === null ? bounds.length : bounds.indexOf(bound);
    const text = bound === null ? "no bound" : `${plain(bound)} nats a token`;
    dial.value = String(at);
    dial.setAttribute("aria-valuetext", text);
    dial.parentElement.style.setProperty("--value", String(at / bounds.length));
    says.textContent = text;
  });
}

/**
 * @param {HTMLElement} root
 * @param {Store} store
 * @param {Description} description
 */
export function buildPresets(root, store, description) {
  const presets = allPresets(description);
  /** @param {import("./state.js").Preset} preset */
  const choose = (preset) => {
    store.edit(weightsOf(preset, store.value.wishes));
    store.bound(preset.max_kl);
  };
  const buttons = presets.map((preset) =>
    element("button", { type: "button", class: "chip", onclick: () => choose(preset) }, preset.name),
  );
  root.replaceChildren(...buttons);
  store.watch(["weights", "side", "budgets"], ({ budgets, side, wishes }) => {
    buttons.forEach((button, i) => {
      const chosen = sameWeights(weightsOf(presets[i], wishes), store.edited) && budgets[side] === presets[i].max_kl;
      button.setAttribute("aria-pressed", String(chosen));
    });
  });
}
