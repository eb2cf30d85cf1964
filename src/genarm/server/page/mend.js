/** Changing what is on the page into what it shall be, node by node: a selection or the focus in it stays. */

/**
 * Have `nodes` in the place of the children of `parent` from the one at `from` on.
 * @param {Element} parent
 * @param {number} from
 * @param {Node[]} nodes
 */
export function mend(parent, from, nodes) {
  nodes.forEach((wanted, i) => {
    const present = parent.childNodes[from + i];
    if (!present) parent.append(wanted);
    else if (!became(present, wanted)) present.replaceWith(wanted);
  });
  while (parent.childNodes.length > from + nodes.length) parent.lastChild.remove();
}

/**
 * Whether `present` could be made the same as `wanted`, and then it is.
 * @param {Node} present
 * @param {Node} wanted
 */
function became(present, wanted) {
  if (present instanceof Text && wanted instanceof Text) {
    if (wanted.data.startsWith(present.data)) present.appendData(wanted.data.slice(present.length));
    else present.data = wanted.data;
    return true;
  }
  if (!(present instanceof Element && wanted instanceof Element) || !present.cloneNode().isEqualNode(wanted.cloneNode())) {
    return false;
  }
  mend(present, 0, [...wanted.childNodes]);
  return true;
}
