/** Puts the page together. */

import { Api } from "./api.js";
import { Chat, sendOnEnter } from "./chat.js";
import { Compare } from "./compare.js";
import { ConversationList } from "./conversations.js";
import { byId } from "./dom.js";
import { conversationFile, download, importFile } from "./export.js";
import { follow } from "./follow.js";
import { HeatMap } from "./heat.js";
import { TradeOffMap } from "./map.js";
import { History } from "./history.js";
import { explained, hideError, hideUndo, showError, toast } from "./notices.js";
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

/** Where a window remembers which conversation it shows, for a reload. */
const OPEN = "genarm:open";

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
    const writer = new Writer(api, description.return_rewards, (span) => this.heat.paint(span));
    const desk = {
      run: (/** @type {(signal: AbortSignal) => Promise<void>} */ task) => this.run(task),
      stop: () => this.#running?.abort(),
      shown: () => this.#shown(),
    };
    this.history = new History(() => this.#showList(), toast);
    this.chat = new Chat(byId("turns"), description.model, this.store, writer, this.history, desk);
    this.compare = new Compare(byId("comparisons"), description, this.store, writer, desk);
    this.list = new ConversationList(byId("list"), {
      open: (id) => this.open(id),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
    });
    byId("model").textContent = description.model;
    document.title = `${description.model} · genarm`;
    buildSettings(this.store, description);
    if (!description.return_rewards) showUnexplained();
    bindRadios("modes", (mode) => this.store.set({ mode, side: "b" }));
    bindRadios("sides", (side) => this.store.set({ side }));
    field("control").addEventListener("change", () => this.store.set({ control: field("control").checked }));
    this.store.watch(["mode", "side"], showView);
    this.store.watch(["busy"], showBusy);
    /** @type {HTMLButtonElement} */ (byId("send")).disabled = false;
    this.#bindComposer();
    byId("stop").addEventListener("click", desk.stop);
    byId("clear").addEventListener("click", () => this.clear());
    byId("export").addEventListener("click", () => this.export());
    byId("import").addEventListener("click", () => field("file").click());
    field("file").addEventListener("change", () => this.import());
    window.addEventListener("pagehide", () => this.store.value.busy && this.chat.keep());
    this.#reopen();
  }

  #bindComposer() {
    const message = /** @type {HTMLTextAreaElement} */ (byId("message"));
    const composer = /** @type {HTMLFormElement} */ (byId("composer"));
    composer.addEventListener("submit", (event) => {
      event.preventDefault();
      const prompt = message.value.trim();
      if (!prompt || this.store.value.busy) return;
      message.value = "";
      const view = this.store.value.mode === "chat" ? this.chat : this.compare;
      this.run((signal) => view.send(prompt, signal));
    });
    sendOnEnter(message, composer);
  }

  /**
   * Have something written, the one thing that is.
   * @param {(signal: AbortSignal) => Promise<void>} task
   */
  async run(task) {
    const running = new AbortController();
    this.#running = running;
    this.store.set({ busy: true });
    hideError();
    hideUndo();
    const unfollow = follow(byId("scroller"));
    try {
      await task(running.signal);
    } finally {
      if (this.#running === running) this.store.set({ busy: false });
      this.heat.repaint();
      unfollow();
    }
  }

  /** Begin a new conversation, or another page of comparisons. */
  clear() {
    const chatting = this.store.value.mode === "chat";
    const view = chatting ? this.chat : this.compare;
    if (!view.empty) {
      const restore = this.#leave(() => (chatting ? this.chat.begin() : this.compare.clear()));
      toast(chatting ? "A new conversation" : "Comparisons cleared", () => this.#leave(restore));
    }
    closeDrawers();
    byId("message").focus();
  }

  /** @param {string} id of a conversation in the list */
  open(id) {
    const conversation = this.history.get(id);
    if (conversation && id !== this.chat.id) this.#leave(() => this.chat.open(conversation));
    this.store.set({ mode: "chat" });
    closeDrawers();
    byId("scroller").scrollTo({ top: byId("scroller").scrollHeight, behavior: "instant" });
  }

  /**
   * @param {string} id
   * @param {string} title
   */
  rename(id, title) {
    const conversation = this.history.get(id);
    if (conversation) this.history.put({ ...conversation, title });
    else this.#showList(); // another window has deleted it
  }

  /** @param {string} id */
  remove(id) {
    const restore = id === this.chat.id ? this.#leave(() => this.chat.begin()) : () => {};
    const conversation = this.history.get(id);
    this.history.remove(id);
    toast(`“${conversation.title}” is deleted`, () => {
      this.history.put(conversation);
      this.#leave(restore);
    });
  }

  export() {
    if (this.chat.empty && this.compare.empty) return toast("There is nothing to export yet");
    const now = new Date();
    const file = conversationFile(this.description, this.store.value, this.chat.record, this.compare.record, now);
    download(`conversation-${now.toISOString().slice(0, 19).replaceAll(":", "")}.json`, file);
  }

  async import() {
    const [file] = field("file").files;
    try {
      const conversation = await importFile(file);
      hideError();
      this.history.put(conversation);
      this.open(conversation.id);
      toast(`“${conversation.title}” is imported`);
    } catch (error) {
      showError(error.message);
    } finally {
      field("file").value = ""; // so that the same file can be chosen again
    }
  }

  /**
   * Do what puts other turns on the page.
   * @template T
   * @param {() => T} action
   */
  #leave(action) {
    this.#running?.abort();
    const done = action();
    hideUndo();
    this.#shown();
    this.#showList();
    return done;
  }

  #shown() {
    this.popover.hide();
    this.heat.repaint();
  }

  /** After a reload, what this window showed. */
  #reopen() {
    const conversation = this.history.get(remembered());
    if (conversation) this.open(conversation.id);
    else this.#showList();
  }

  #showList() {
    this.list.show(this.history.list, this.chat.id);
    byId("none").hidden = this.history.list.length > 0;
    remember(this.chat.id);
  }
}

function remembered() {
  try {
    return sessionStorage.getItem(OPEN) ?? "";
  } catch {
    return "";
  }
}

/** @param {string} id */
function remember(id) {
  try {
    sessionStorage.setItem(OPEN, id);
  } catch {
    // The browser keeps nothing for this page.
  }
}

/**
 * @param {Store} store
 * @param {Description} description
 */
function buildSettings(store, description) {
  // A base alone is served as well, and may take wishes all the same.
  byId("steering").hidden = description.data.length === 0 && !description.request_wishes;
  byId("presets").hidden = description.data.length === 0;
  buildPresets(byId("presets"), store, description);
  buildWeights(byId("weights"), store, description);
  if (description.request_wishes) {
    const form = /** @type {HTMLFormElement} */ (byId("wish-form"));
    buildWishes(byId("wishes"), form, store, description);
  }
  buildDial(field("budget"), byId("budget-says"), store, description);
  if (description.data.length > 1) {
    byId("trade-off").hidden = false;
    new TradeOffMap(byId("map"), byId("axes"), store, description);
  }
  bindSampling(store);
}

/** @param {Store} store */
function bindSampling(store) {
  for (const name of /** @type {const} */ (["temperature", "top_p", "max_tokens", "seed"])) {
    bindNumber(field(name), {
      read: () => store.value.sampling[name],
      write: (value) => store.set({ sampling: { ...store.value.sampling, [name]: value } }),
    });
  }
  store.watch(["system"], ({ system }) => {
    if (field("system").value.trim() !== system) field("system").value = system;
  });
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
  byId("heat-label").textContent = "Tokens";
  byId("inspect").textContent = "The tokens of a reply say how likely each of them was.";
}

/** Where there is no room for the conversations or the settings, they lie over the page. */
function bindDrawers() {
  for (const name of ["conversations", "settings"]) bindDrawer(byId(`open-${name}`), byId(`close-${name}`), byId(name));
}

function closeDrawers() {
  for (const drawer of document.querySelectorAll(".drawer.open .close")) /** @type {HTMLElement} */ (drawer).click();
}

/**
 * @param {HTMLElement} opener
 * @param {HTMLElement} closer
 * @param {HTMLElement} drawer
 */
function bindDrawer(opener, closer, drawer) {
  /** @param {boolean} open */
  const show = (open) => {
    drawer.classList.toggle("open", open);
    opener.setAttribute("aria-expanded", String(open));
    for (const other of document.body.children) {
      if (other !== drawer && other.matches("header, main, nav, aside")) /** @type {HTMLElement} */ (other).inert = open;
    }
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
    showError(explained(error));
    return false;
  }
}

function start() {
  bindDrawers();
  let connected = connect();
  byId("connection").addEventListener("submit", async (event) => {
    event.preventDefault();
    api.key = field("key").value.trim();
    if (!(await connected)) connected = connect();
    if (await connected) toast(api.key ? "The key is used from now on" : "No key is sent any more");
  });
}

start();
