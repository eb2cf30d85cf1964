/** Number fields: what they take, and words for what they do not. */

import { toast } from "./notices.js";

/**
 * Keep a number field and a value together. What is not allowed is marked and does not count; on leaving the field the
 * last value that counted comes back, and a toast says why.
 * @param {HTMLInputElement} field with a name, and with min, max and step, which say what is allowed
 * @param {{read: () => number | null, write: (value: number | null) => void}} value null where the field may be empty
 * @returns {() => void} shows the value anew
 */
export function bindNumber(field, { read, write }) {
  const show = () => {
    if (document.activeElement !== field || !field.validity.valid) field.value = String(read() ?? "");
    field.removeAttribute("aria-invalid");
  };
  field.addEventListener("input", () => {
    const { valid } = field.validity;
    if (valid) field.removeAttribute("aria-invalid");
    else field.setAttribute("aria-invalid", "true");
    if (valid) write(field.value === "" ? null : field.valueAsNumber);
  });
  field.addEventListener("blur", () => {
    const refused = field.validity.valid ? "" : refusal(field);
    field.value = String(read() ?? "");
    field.removeAttribute("aria-invalid");
    if (refused) toast(`${refused}; it stays ${field.value || field.placeholder}`);
  });
  show();
  return show;
}

/** @param {HTMLInputElement} field */
function refusal(field) {
  const [name] = (field.getAttribute("aria-label") ?? field.labels[0].textContent.trim()).split(",");
  const [given, what] = [field.value, field.step === "any" ? "a number" : "a whole number"];
  return `${name} takes ${what} ${span(field)}${given ? `, not ${given}` : ""}`;
}

/** @param {HTMLInputElement} field */
function span({ min, max }) {
  return max ? `from ${min} to ${max}` : `of ${min} or more`;
}
