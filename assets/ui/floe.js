// What every element of the page shares: texts, requests, the one event stream, the open conversation, notices.
// Browsers allow six connections to one host. One tab (the holder of the lock) keeps the stream and passes the events
// on to the others; when it closes, the next one takes over. Knows no element.

const AGAIN_MS = 700; // until a stream that ended is asked for again

export const bus = new EventTarget();
export function on(name, handler) {
  bus.addEventListener(name, (event) => handler(event.detail));
  if (name !== "state") return; // it comes only when something changed: an element that is made late must not wait for it
  setTimeout(() => state !== UNKNOWN && handler({ now: state, before: UNKNOWN }));
}
export const emit = (name, detail) => bus.dispatchEvent(new CustomEvent(name, { detail }));

class Said extends Error {} // the person has been told already
export class Unheard extends Said {} // nobody answers at the moment
window.addEventListener("unhandledrejection", (event) => event.reason instanceof Said && event.preventDefault());

async function sentence(reply) {
  const json = (reply.headers.get("content-type") || "").startsWith("application/json");
  return json ? (await reply.json()).error : reply.status < 500 && (await reply.text());
}

async function heard(method, path, body, signal) {
  let reply;
  try {
    const raw = typeof body === "string" || body instanceof Blob; // a file goes as it lies on the disk
    reply = await fetch(path, {
      method,
      signal,
      headers: body === undefined ? {} : { "content-type": raw ? "application/octet-stream" : "application/json" },
      body: body === undefined || raw ? body : JSON.stringify(body),
    });
  } catch {
    if (signal?.aborted) throw new Said(); // by the person
    if (presence === "here") notice(TEXT.gone || "The program does not answer.");
    throw new Unheard();
  }
  if (reply.ok) return reply;
  if (reply.status === 401) { // it was started again meanwhile, which is said above the conversation
    tell("shut");
    throw new Unheard();
  }
  const error = (await sentence(reply)) || TEXT.status_error;
  notice(error);
  throw new Said(error);
}

export const api = async (method, path, body, signal) => (await heard(method, path, body, signal)).json();

// What waits for another computer: meanwhile its place says so, with a Stop that ends it. asking: given the signal.
export async function patiently(place, words, asking) {
  const before = [...place.childNodes], stop = new AbortController();
  place.replaceChildren(h("span", { class: "spinner" }), h("span", {}, words),
    h("button", { type: "button", class: "quiet", onclick: () => stop.abort() }, TEXT.stop));
  try {
    return await asking(stop.signal);
  } finally {
    place.replaceChildren(...before);
  }
}

// A link of the page's own cannot carry the key, so what is to be kept is fetched first.
export async function download(path) {
  const reply = await heard("GET", path);
  const [, name] = /filename\*=UTF-8''(.*)/.exec(reply.headers.get("content-disposition"));
  const address = URL.createObjectURL(await reply.blob());
  h("a", { href: address, download: decodeURIComponent(name) }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

export const TEXT = {};
export const ready = api("GET", "/api/strings").then((strings) => Object.assign(TEXT, strings));
export const say = (name, values = {}) =>
  (TEXT[name] || name).replace(/\{(\w+)\}/g, (_, key) => (key in values ? values[key] : `{${key}}`));

// A page that came over a network, without encryption, has no clipboard of its own.
export async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { readonly: true, class: "sr-only" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  return area.remove();
}

// Numbers as a person reads them.
export function bytes(n) {
  if (n === undefined || n === null || Number.isNaN(n)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1000; i += 1; }
  return `${i === 0 ? Math.round(n) : n.toFixed(n < 10 ? 2 : 1)} ${units[i]}`;
}
export const rate = (n) => (n >= 10 ? n.toFixed(0) : n >= 0.05 ? n.toFixed(1) : "<0.1");
export const duration = (s) =>
  (s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);

// A small element builder: h("button", {class: "x", onclick}, "text", child)
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "html") node.innerHTML = value; // only for HTML that the program itself rendered
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Children of `place` for [key, item] pairs, in order: made once for a key, brought up to date every time. What is
// replaced under the pointer loses the click, and what is typed into it is gone; so what stays is not even moved.
export function keep(place, pairs, make, update = () => {}) {
  const wanted = new Set(pairs.map(([key]) => key)), old = new Map();
  for (const node of [...place.children]) wanted.has(node.key) ? old.set(node.key, node) : node.remove();
  pairs.forEach(([key, item], i) => {
    const node = old.get(key) || make(item);
    node.key = key;
    update(node, item);
    if (place.children[i] !== node) place.insertBefore(node, place.children[i] || null);
  });
}

export const icon = (name) => {
  const span = h("span", { class: "icon", "aria-hidden": "true" });
  span.innerHTML = `<svg viewBox="0 0 24 24" width="18" height="18" fill="none" stroke="currentColor"
    stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round">${ICONS[name]}</svg>`;
  return span;
};

const ICONS = {
  plus: '<path d="M12 5v14M5 12h14"/>',
  search: '<circle cx="11" cy="11" r="6.5"/><path d="m16 16 4.5 4.5"/>',
  send: '<path d="M12 19V5m-6.5 6.5L12 5l6.5 6.5"/>',
  stop: '<rect x="6.5" y="6.5" width="11" height="11" rx="2" fill="currentColor" stroke="none"/>',
  clip: '<path d="m20 11-8.2 8.2a5 5 0 0 1-7.1-7.1l8.6-8.6a3.4 3.4 0 0 1 4.8 4.8L9.6 16.8a1.7 1.7 0 0 1-2.4-2.4l7.6-7.6"/>',
  copy: '<rect x="9" y="9" width="11" height="11" rx="2"/><path d="M5 15V6a2 2 0 0 1 2-2h8"/>',
  edit: '<path d="m4 20 1-4.5L16.5 4 20 7.5 8.5 19Z"/>',
  again: '<path d="M20 11a8 8 0 1 0-2.3 6.7M20 4.5V11h-6.5"/>',
  go: '<path d="m6 5 8 7-8 7M17 5v14"/>',
  branch: '<circle cx="6" cy="5" r="2"/><circle cx="6" cy="19" r="2"/><circle cx="18" cy="8" r="2"/><path d="M6 7v10m12-7c0 5-6 4-11 6"/>',
  left: '<path d="m14.5 6-6 6 6 6"/>',
  right: '<path d="m9.5 6 6 6-6 6"/>',
  down: '<path d="m6 9.5 6 6 6-6"/>',
  more: '<circle cx="5" cy="12" r="1"/><circle cx="12" cy="12" r="1"/><circle cx="19" cy="12" r="1"/>',
  pin: '<path d="M9 4h6l-1 6 3 3v2H7v-2l3-3-1-6Zm3 11v5"/>',
  close: '<path d="m6 6 12 12M18 6 6 18"/>',
  menu: '<path d="M4 7h16M4 12h16M4 17h16"/>',
  gauge: '<path d="M4 17a8 8 0 1 1 16 0M12 17l4-5"/>',
  settings: '<circle cx="12" cy="12" r="3"/><path d="M12 3.5v3m0 11v3M3.5 12h3m11 0h3M6 6l2.1 2.1m7.8 7.8L18 18M18 6l-2.1 2.1m-7.8 7.8L6 18"/>',
  models: '<path d="m12 3 8 4.5v9L12 21l-8-4.5v-9Zm0 9 8-4.5M12 12v9m0-9L4 7.5"/>',
  sliders: '<path d="M4 7h9m5 0h2M4 17h3m5 0h8"/><circle cx="15.5" cy="7" r="2.3"/><circle cx="9.5" cy="17" r="2.3"/>',
  info: '<circle cx="12" cy="12" r="8.5"/><path d="M12 11v5m0-8.5v.1"/>',
  theme: '<circle cx="12" cy="12" r="8"/><path d="M12 4v16a8 8 0 0 0 0-16Z" fill="currentColor"/>',
  bolt: '<path d="M13 3 5 14h6l-1 7 8-11h-6l1-7Z"/>',
  star: '<path d="m12 4 2.4 5 5.6.7-4.1 3.8 1.1 5.5-5-2.8-5 2.8 1.1-5.5L4 9.7 9.6 9Z"/>',
  code: '<path d="m8 8-4 4 4 4m8-8 4 4-4 4M13.5 6l-3 12"/>',
  book: '<path d="M5 5.5A2.5 2.5 0 0 1 7.5 3H19v15H7.5A2.5 2.5 0 0 0 5 20.5Zm0 15A2.5 2.5 0 0 0 7.5 21H19"/>',
  wave: '<path d="M3 9c3-4 6-4 9 0s6 4 9 0M3 16c3-4 6-4 9 0s6 4 9 0"/>',
};

export const button = (name, label, onclick, extra = {}) =>
  h("button", { type: "button", class: "icon-button", title: label, "aria-label": label, onclick, ...extra }, icon(name));

export const notices = h("div", { id: "floe-notice", role: "status", "aria-live": "polite" });

// Notices, each said once. actions: [label, handler] each; a notice that asks for something stays until it is answered.
export function notice(text, ...actions) {
  if (!notices.isConnected) document.body.append(notices); // the page has not been drawn yet
  for (const old of [...notices.children]) if (old.text === text) old.remove();
  const node = h("div", { class: "notice" }, h("span", {}, text), ...actions.map(([label, handler]) =>
    h("button", { type: "button", onclick: () => { node.remove(); handler(); } }, label)),
  actions.length > 0 && button("close", TEXT.dismiss, () => node.remove()));
  node.text = text;
  notices.append(node);
  if (!actions.length) setTimeout(() => node.remove(), 6000);
}

// The open conversation of this tab: in the address, so that a reload finds it. Where the address names a page (pages.js),
// it is the conversation that was open before, which lies below that page.
let lies = null;
export const opened = {
  get id() {
    const match = /^(?:#c(\d+))?$/.exec(location.hash);
    if (match) lies = match[1] ? Number(match[1]) : null;
    return lies;
  },
  set id(value) {
    lies = value;
    history.replaceState(null, "", value ? `#c${value}` : location.pathname);
    emit("opened", value);
  },
};

const UNKNOWN = { conversations: [], waiting: [], works: [], finished: [],
  model: { state: "loading", step: "", opening: null }, live: null };
export let state = UNKNOWN;

// The answer that is being written, as far as this tab has heard of it: every block, while updates bring the changed ones.
let written = null;
export const soFar = (message) => (written?.message === message ? written : null);

function keepUp(update) {
  const { blocks, thinking_blocks: thinking } = soFar(update.message) || { blocks: [], thinking_blocks: [] };
  if (blocks.length < update.from || thinking.length < update.thinking_from) { // this tab came in the middle
    written = null;
    return channel.postMessage({ name: "whole" }); // another one may have heard the beginning
  }
  written = { ...update, from: 0, blocks: [...blocks.slice(0, update.from), ...update.blocks], thinking_from: 0,
    thinking_blocks: [...thinking.slice(0, update.thinking_from), ...update.thinking_blocks] };
}

// Whether the program is "here" for this tab, "gone", or "shut": it was started again and does not know this browser.
let presence = "here";
function tell(next) {
  if (next === presence) return;
  presence = next;
  written = null;
  document.body.classList.toggle("gone", next !== "here");
  if (next !== "here") // whatever was under way is not any more
    receive("state", { ...state, live: null, waiting: [], works: [], model: { ...state.model, state: next, opening: null } });
  emit("presence", next);
}

function receive(name, document) {
  if (name === "presence") return tell(document);
  if (name === "text") keepUp(document);
  if (name === "state") {
    const before = state;
    state = document;
    emit("state", { now: document, before });
  } else emit(name, document);
}

on("trouble", notice);
const channel = new BroadcastChannel("floe-events");
channel.onmessage = ({ data }) => {
  if (data.name !== "whole") receive(data.name, data.document);
  else if (written) channel.postMessage({ name: "text", document: written });
};

async function refresh() {
  receive("state", await api("GET", "/api/state"));
}

// EventSource sends no headers, and gives up for ever where it is refused once.
async function hold() {
  for (;;) {
    const reply = await fetch("/events").catch(() => null);
    pass("presence", reply?.ok ? "here" : reply ? "shut" : "gone");
    if (reply?.ok) await listen(reply).catch(() => {});
    await new Promise((again) => setTimeout(again, AGAIN_MS));
  }
}

async function listen(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let text = "", read = {}; !read.done; read = await reader.read()) {
      const events = (text + (read.value || "")).split("\n\n");
      text = events.pop();
      events.forEach(take);
    }
  } finally {
    reader.cancel().catch(() => {}); // one that is left open takes one of the browser's six connections for ever
  }
}

function take(event) {
  const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(event);
  pass(name, JSON.parse(data));
}

function pass(name, document) {
  receive(name, document);
  channel.postMessage({ name, document });
}

let started = false;
export function start() {
  if (started) return;
  started = true;
  ready.then(async () => {
    navigator.locks ? navigator.locks.request("floe-events", hold) : hold(); // none for a page that came over a network
    await refresh();
    emit("ready");
  });
}
