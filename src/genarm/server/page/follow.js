/** Scrolling along with a reply. */

/** How many pixels from the end still count as being there. */
const NEAR_END = 60;

/**
 * Keep the end in sight while it grows, unless the reader has scrolled away from it.
 * @param {HTMLElement} scroller
 * @returns {() => void} ends it
 */
export function follow(scroller) {
  let following = true;
  let before = scroller.scrollTop;
  let frame = 0; // once for each picture: asking for the height lays out the whole reply anew
  const bottom = () => {
    frame = 0;
    if (following) scroller.scrollTo({ top: scroller.scrollHeight, behavior: "instant" });
    before = scroller.scrollTop;
  };
  const observer = new MutationObserver(() => {
    frame ||= requestAnimationFrame(bottom);
  });
  const scrolled = () => {
    const left = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
    if (scroller.scrollTop < before) following = false;
    else if (left < NEAR_END) following = true;
    before = scroller.scrollTop;
  };
  // Said at once, for the next picture would undo a scroll that has only begun.
  const wheeled = (/** @type {WheelEvent} */ event) => {
    if (event.deltaY < 0) following = false;
  };
  const touched = () => {
    following = false;
  };
  const listening = new AbortController();
  const options = { passive: true, signal: listening.signal };
  observer.observe(scroller, { childList: true, subtree: true });
  scroller.addEventListener("scroll", scrolled, options);
  scroller.addEventListener("wheel", wheeled, options);
  scroller.addEventListener("touchmove", touched, options);
  return () => {
    bottom(); // what came last has not been seen yet
    observer.disconnect();
    listening.abort();
  };
}
