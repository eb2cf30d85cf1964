/** Puts the page together. */

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { byId } from "./dom.js";
import { conversationFile, download } from "./export.js";
import { follow } from "./follow.js";
import { HeatMap } from "./heat.js";
import { TradeOffMap } from "./map.js";
import { hideError, hideUndo, showError, toast } from "./notices.js";
import { bindNumber } from "./number.js";
import { Popover } from "./popover.js";
import { initialSettings, Store } from "./state.js";
import { buildDial, buildPresets, buildWeights, buildWishes } from "./weights.js";
import { Writer } from "./write.js";

/**
 * @typedef {import("./api.js").Description} Description
 * @typedef {import("./state.js").Settings} Settings
 */

const api = new Api(document.baseURI);

/** @param {string} id */
const field = (id) => /** @type {HTMLInputElement} */ (byId(id));

/** The page with a model behind it. */
class Page {
  /** @type {AbortController | null} */
  #running = null;

  /** @param {Description} description */
  constructor(description) {
    this.description = description;
    this.store = new Store(initialSettings(description));
    this.heat = new HeatMap(this.store, description);
    this.popover = new Popover(byId("popover"), byId("main"));
    const writer = new Writer(
      api,
      description.return_rewards,
      (span) => this.heat.paint(span),
      () => this.again(),
    );
    this.chat = new Chat(byId("turns"), description.model, this.store, writer);
    this.compare = new Compare(byId("comparisons"), description, this.store, writer);
    byId("model").textContent = description.model;
    document.title = `${description.model} · genarm`;
    // A base alone is served as well, and may take wishes all the same.
    byId("steering").hidden = description.data.length === 0 && !description.request_wishes;
    if (!description.return_rewards) showUnexplained();
    byId("presets").hidden = description.data.length === 0;
    buildPresets(byId("presets"), this.store, description);
    buildWeights(byId("weights"), this.store, description);
    if (description.request_wishes) {
      const form = /** @type {HTMLFormElement} */ (byId("wish-form"));
      buildWishes(byId("wishes"), form, this.store, description);
    }
    buildDial(field("budget"), byId("budget-says"), this.store, description);
    if (description.data.length > 1) {
      byId("trade-off").hidden = false;
      new TradeOffMap(byId("map"), byId("axes"), this.store, description);
    }
    bindSampling(this.store);
    bindRadios("modes", (mode) => this.store.set({ mode, side: "b" }));
    bindRadios("sides", (side) => this.store.set({ side }));
    field("control").addEventListener("change", () => this.store.set({ control: field("control").checked }));
    this.store.watch(["mode", "side"], showView);
    this.store.watch(["busy"], showBusy);
    /** @type {HTMLButtonElement} */ (byId("send")).disabled = false;
    this.#bindComposer();
    byId("stop").addEventListener("click", () => this.#running?.abort());
    byId("clear").addEventListener("click", () => this.clear());
    byId("export").addEventListener("click", () => this.export());
  }

  #bindComposer() {
    const message = field("message");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      const prompt = message.value.trim();
      if (!prompt || this.store.value.busy) return;
      message.value = "";
      this.send(prompt);
    });
    message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      /** @type {HTMLFormElement} */ (byId("composer")).requestSubmit();
    });
  }

  /** @param {string} prompt */
  async send(prompt) {
    const view = this.store.value.mode === "chat" ? this.chat : this.compare;
    this.#running = new AbortController();
    this.store.set({ busy: true });
    hideError();
    hideUndo();
    const unfollow = follow(byId("scroller"));
    try {
      await view.send(prompt, this.#running.signal);
    } finally {
      this.store.set({ busy: false });
      this.heat.repaint();
      unfollow();
    }
  }

  /** Write the last reply of the conversation again, with the present settings. */
  again() {
    if (this.store.value.busy) return;
    byId("message").focus();
    this.send(this.chat.takeBack());
  }

  clear() {
    this.#running?.abort();
    const view = this.store.value.mode === "chat" ? this.chat : this.compare;
    if (view.empty) return;
    this.popover.hide();
    const restore = view.clear();
    toast(view === this.chat ? "Conversation cleared" : "Comparisons cleared", () => {
      restore();
      this.heat.repaint();
    });
    byId("message").focus();
  }

  export() {
    if (this.chat.empty && this.compare.empty) return toast("There is nothing to export yet");
    const now = new Date();
    const file = conversationFile(this.description, this.store.value, this.chat.record, this.compare.record, now);
    download(`conversation-${now.toISOString().slice(0, 19).replaceAll(":", "")}.json`, file);
  }
}

/** @param {Store} store */
function bindSampling(store) {
  for (const name of /** @type {const} */ (["temperature", "top_p", "max_tokens", "seed"])) {
    bindNumber(field(name), {
      read: () => store.value.sampling[name],
      write: (value) => store.set({ sampling: { ...store.value.sampling, [name]: value } }),
    });
  }
  field("system").value = store.value.system;
  field("system").addEventListener("input", () => store.set({ system: field("system").value.trim() }));
}

/**
 * @param {string} group
 * @param {(value: any) => void} choose
 */
function bindRadios(group, choose) {
  byId(group).addEventListener("change", (event) => choose(/** @type {HTMLInputElement} */ (event.target).value));
}

/** @param {Settings} settings */
function showView({ mode, side }) {
  byId("chat").hidden = mode !== "chat";
  byId("compare").hidden = mode !== "compare";
  byId("sides").hidden = byId("control-choice").hidden = mode !== "compare";
  for (const value of [mode, side]) {
    /** @type {HTMLInputElement} */ (document.querySelector(`input[type="radio"][value="${value}"]`)).checked = true;
  }
  field("message").placeholder = mode === "chat" ? "Ask something" : "Ask both settings something";
}

/** @param {Settings} settings */
function showBusy({ busy }) {
  const had = document.activeElement === byId("stop");
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("main").setAttribute("aria-busy", String(busy));
  if (had) byId("message").focus();
}

/** Without the models' own numbers there is nothing to colour, and less to see behind a token. */
function showUnexplained() {
  byId("tools").hidden = true;
  byId("inspect").textContent = "to see how likely it was.";
}

/** On a phone the settings lie over the conversation. */
function bindDrawer() {
  const [opener, closer, drawer] = [byId("open-settings"), byId("close-settings"), byId("settings")];
  /** @param {boolean} open */
  const show = (open) => {
    drawer.classList.toggle("open", open);
    opener.setAttribute("aria-expanded", String(open));
    byId("bar").inert = byId("main").inert = open;
    (open ? closer : opener).focus();
  };
  opener.addEventListener("click", () => show(true));
  closer.addEventListener("click", () => show(false));
  drawer.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && drawer.classList.contains("open")) show(false);
  });
  window.addEventListener("resize", () => {
    if (drawer.classList.contains("open") && !closer.checkVisibility()) show(false); // it has become a column
  });
}

/** Ask the server what it serves, and build the page on it; a server that wants a key is asked again with one. */
async function connect() {
  try {
    const description = await api.rewards();
    hideError();
    new Page(description);
    return true;
  } catch (error) {
    showError(error);
    return false;
  }
}

function start() {
  bindDrawer();
  let connected = connect();
  byId("connection").addEventListener("submit", async (event) => {
    event.preventDefault();
    api.key = field("key").value.trim();
    if (!(await connected)) connected = connect();
    if (await connected) toast(api.key ? "The key is used from now on" : "No key is sent any more");
  });
}

start();
