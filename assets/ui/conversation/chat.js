// The middle of the page: messages, the answer while it grows, the queue, and the place to write.
// A conversation is drawn from /api/conversations/ID; a growing answer then changes only the blocks that changed.
import { dismiss } from "/ui/dismiss.js";
import { restoreDrawers, toggleList, toggleTab } from "/ui/drawers.js";
import { TEXT, Unheard, api, button, emit, h, icon, keep, notice, notices, on, opened, ready, say, soFar, start, state, toClipboard } from "/ui/floe.js";
import { above } from "/ui/conversation/above.js";
import { composer } from "/ui/conversation/composer.js";
import { watch } from "/ui/conversation/elsewhere.js";
import { pages } from "/ui/pages.js";
import { foldLong, message, offerActions, showStats, showThinking } from "/ui/conversation/message.js";
import { begin, draft, stored } from "/ui/conversation/settings.js";
import { applyTheme, switchTheme } from "/ui/theme.js";
import { switcher } from "/ui/conversation/switcher.js";
import { welcome } from "/ui/conversation/welcome.js";

const loads = { begun: 0, drawn: 0 };
let goal = null; // the message that a search has found
let atEnd = true; // where the conversation was scrolled to, before the window changed its size
let log, scroller, queue, title, meter, drawn = { id: null, limit: 40 };

export async function mount(root) {
  await ready;
  log = h("div", { class: "messages", role: "log", "aria-live": "off", "aria-label": TEXT.conversation });
  queue = h("ul", { class: "queue", "aria-label": TEXT.waiting });
  title = h("h1", {}, TEXT.app);
  meter = h("span", { class: "meter", id: "context-meter" });
  const down = button("down", TEXT.jump_down, () => follow(true), { class: "icon-button jump", hidden: true });
  scroller = h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": TEXT.conversation,
    onscroll: () => { if (scroller.clientHeight) down.hidden = atEnd = nearEnd(); } }, log, queue); // a page may lie in its place
  new ResizeObserver(() => follow(atEnd)).observe(scroller); // a phone that is turned, a keyboard that opens
  root.replaceChildren(h("div", { class: "chat" },
    h("header", { class: "bar" },
      button("menu", TEXT.menu, toggleList), switcher(), title,
      button("theme", TEXT.theme, switchTheme, { id: "theme" }),
      opener("sliders", "tab_chat"), opener("gauge", "tab_engine")),
    ...above(), welcome(() => scroller.parentElement), ...pages(), scroller, down, notices,
    composer(send, meter),
    h("div", { id: "announce", class: "sr-only", role: "status", "aria-live": "polite" })));
  log.addEventListener("click", clicked);
  on("opened", () => { drawn.limit = 40; load(); });
  on("goal", (id) => { goal = id; });
  on("state", changed);
  on("presence", (now) => now === "here" && load());
  on("text", grow);
  document.addEventListener("keydown", shortcut);
  document.addEventListener("keydown", applyNumber, true);
  document.addEventListener("blur", keepInside, true);
  window.addEventListener("hashchange", () => emit("opened", opened.id));
  applyTheme();
  restoreDrawers();
  start();
  watch();
  load();
}

// Loading and drawing

// stay: what is seen stays where it is, however near the end.
export async function load(stay = false) {
  const id = opened.id;
  const turn = ++loads.begun;
  if (!id) return drawEmpty();
  let conversation;
  try {
    conversation = await api("GET", `/api/conversations/${id}?limit=${drawn.limit}&with=${goal || 0}`);
  } catch (error) {
    if (opened.id === id && !(error instanceof Unheard)) opened.id = null; // it is gone
    return;
  }
  if (opened.id !== id || turn < loads.drawn) return; // a newer answer has overtaken this one
  loads.drawn = turn;
  const hold = drawn.id === id && (stay || !nearEnd()) ? seen() : null;
  drawn = { id, limit: Math.max(drawn.limit, conversation.messages.length) };
  title.textContent = conversation.conversation.title || TEXT.untitled;
  drawMessages(conversation);
  measure(id, turn);
  if (goal) await showFound();
  else if (hold) scroller.scrollTop += hold.node.getBoundingClientRect().top - hold.top;
  else follow(true);
  if (outlived()) setTimeout(() => outlived() && load(), 200);
  return true;
}

// The first message in sight, and where: what comes above it moves it, and is taken back by as much.
function seen() {
  const edge = scroller.getBoundingClientRect().top;
  const node = [...log.querySelectorAll(".message")].find((each) => each.getBoundingClientRect().bottom > edge);
  return node && { node, top: node.getBoundingClientRect().top };
}

// The message that was searched for, in the middle; where it is of a version that is not shown, that is shown first.
async function showFound() {
  const id = goal, found = () => log.querySelector(`[data-id="${id}"]`);
  goal = null;
  if (!found()) {
    await api("POST", `/api/messages/${id}/show`);
    await load();
  }
  found()?.classList.add("hit");
  found()?.querySelector('.unfold[aria-expanded="false"]')?.click(); // what was found may stand in the part that is folded
  found()?.scrollIntoView({ block: "center" });
}

// A message stays as it is drawn until it changes: an edit that has been begun outlives the answer that ends meanwhile.
function drawMessages({ messages, n_messages: n }) {
  const rows = messages.map((m, i) => ({ m, last: i === messages.length - 1 }));
  const key = ({ m }) => (m.status === "running" ? Symbol("growing") : JSON.stringify(m));
  const earlier = n > messages.length ? [["earlier", null]] : [];
  keep(log, [...earlier, ...rows.map((row) => [key(row), row])], (row) => (row ? message(row.m)
    : h("button", { type: "button", class: "quiet earlier", onclick: () => { drawn.limit += 40; load(true); } }, TEXT.earlier)),
  (node, row) => row && offerActions(node, row.m, row.last, act));
  foldLong(log, scroller.clientHeight);
}

// Whether a message is drawn as growing that the program is not writing (any more, or not yet).
function outlived() {
  const growing = log.querySelector(".message.running");
  return growing && Number(growing.dataset.id) !== state.live?.message;
}

function drawEmpty() {
  drawn.id = null;
  title.textContent = TEXT.app;
  drawMeter(0, state.model.context || 0);
  log.replaceChildren(h("div", { class: "hero" }, h("div", { class: "hero-mark" }, icon("wave")),
    h("h2", {}, TEXT.hero), state.model.is_demo !== false && h("p", {}, TEXT.demo_note),
    h("div", { class: "examples" }, ...TEXT.examples.map((text) =>
      h("button", { type: "button", onclick: () => send(text, []) }, text)))));
}

// Only the model can count, and it may be busy, or unable to: nothing else waits for it.
async function measure(id, turn) {
  const { used, total } = await api("GET", `/api/conversations/${id}/context`).catch(() => ({}));
  if (opened.id === id && turn === loads.begun) drawMeter(used, total);
}

function drawMeter(used, total) {
  const share = total ? Math.min(1, used / total) : 0;
  meter.textContent = total ? say("context", { used: used?.toLocaleString("en") ?? TEXT.context_unknown,
    total: total.toLocaleString("en") }) : "";
  meter.style.setProperty("--share", share);
  meter.classList.toggle("nearly-full", share > 0.85);
}

function changed({ now, before }) {
  keep(queue, now.waiting.filter((w) => w.conversation_id === opened.id).map((w) => [String(w.id), w]), waitingItem);
  document.body.classList.toggle("answering", Boolean(now.live));
  const ended = before.live && before.live.message !== now.live?.message;
  const begun = now.live && before.live?.message !== now.live.message && now.live.conversation === opened.id;
  if (ended && before.live.conversation === opened.id) load().then((there) => there && announce());
  else if (outlived() || (begun && !log.querySelector(`[data-id="${now.live.message}"]`))) load();
  const listed = now.conversations.find((c) => c.id === opened.id);
  if (listed) title.textContent = listed.title || TEXT.untitled;
  if (before.model.state !== "ready" && now.model.state === "ready") load();
}

function waitingItem(item) {
  return h("li", {}, h("span", { class: "tag" }, TEXT.waiting), h("span", { class: "waiting-text" }, item.text),
    button("edit", TEXT.edit, async () => emit("draft", (await api("DELETE", `/api/waiting/${item.id}`)).text)),
    button("close", TEXT.remove, () => api("DELETE", `/api/waiting/${item.id}`)));
}

// The growing answer

function grow(update) {
  if (update.conversation !== opened.id) return;
  const node = log.querySelector(`[data-id="${update.message}"]`);
  if (!node || !node.classList.contains("running")) return;
  const stick = nearEnd(), known = soFar(update.message);
  if (!replaceAll(node, update) && !(known && replaceAll(node, known))) return; // the beginning has been asked for
  showThinking(node, update);
  showStats(node, update.stats);
  if (stick) follow(true);
}

const replaceAll = (node, update) => replaceBlocks(node.querySelector(".answer"), update.from, update.blocks)
  && replaceBlocks(node.querySelector(".thought .md"), update.thinking_from, update.thinking_blocks);

function replaceBlocks(place, from, blocks) {
  const first = place.firstElementChild;
  if (first && !first.classList.contains("block")) place.replaceChildren(); // was drawn as a whole
  if (place.children.length < from) return false;
  while (place.children.length > from + blocks.length) place.lastElementChild.remove();
  blocks.forEach((html, i) => {
    const old = place.children[from + i];
    if (!old) place.append(h("div", { class: "block", html }));
    else if (old.source !== html) old.innerHTML = html;
    place.children[from + i].source = html;
  });
  return true;
}

function announce() {
  const answers = log.querySelectorAll(".assistant .answer");
  const text = answers.length ? answers[answers.length - 1].textContent.trim() : "";
  document.getElementById("announce").textContent = `${TEXT.answer_done} ${text}`;
}

const nearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;

function follow(now) {
  if (now) scroller.scrollTop = scroller.scrollHeight;
}

// What a person does

// It goes to the conversation that is open now, whatever is opened before it has been taken.
async function send(text, attachments) {
  let { id } = opened;
  await stored();
  if (!id) {
    ({ id } = await api("POST", "/api/conversations", { draft: draft() }));
    begin(id);
    emit("begun", id);
    if (!opened.id) opened.id = id;
  }
  await api("POST", `/api/conversations/${id}/send`, { text, attachments });
  emit("sent");
  document.body.classList.add("answering");
  drawn.limit = Math.max(40, drawn.limit);
  await load();
  follow(true);
}

async function act(name, id, argument) {
  const path = `/api/messages/${id}`;
  if (name === "copy") {
    const { text } = await api("GET", path);
    await toClipboard(text);
    return notice(TEXT.copied);
  }
  if (name === "branch") {
    opened.id = (await api("POST", `${path}/branch`)).id;
    return notice(TEXT.branched);
  }
  if (name === "show") await api("POST", `/api/messages/${argument}/show`);
  else {
    await stored(); // what was typed a moment ago holds for this answer, too
    await api("POST", `${path}/${name}`, argument);
  }
  await load();
}

async function clicked(event) {
  const copy = event.target.closest(".copy-code");
  if (!copy) return;
  await toClipboard(copy.closest(".code").querySelector("pre").textContent);
  copy.textContent = TEXT.copied;
  setTimeout(() => { copy.textContent = TEXT.copy; }, 1500);
}

function shortcut(event) {
  const control = event.ctrlKey || event.metaKey;
  if (control && event.key.toLowerCase() === "k") emit("search");
  else if (control && event.shiftKey && event.key.toLowerCase() === "o") emit("new-chat");
  else if (event.key === "Escape" && dismiss()) return;
  else if (event.key === "Escape" && document.body.classList.contains("answering")
      && !event.target.closest("input, .editing")) api("POST", "/api/stop"); // as long as Stop is there
  else return;
  event.preventDefault();
}

// Gradio's number fields take a value when they lose the focus; Enter means the same, and the focus stays.
function applyNumber(event) {
  if (event.key !== "Enter" || !event.target.matches("#near input[type=number]")) return;
  event.target.blur();
  event.target.focus();
}

// A slider's number beyond its ends means the end; Gradio would answer with an error. Comes before Gradio's own handler.
function keepInside({ target }) {
  if (!target.matches?.("#near input[type=number]") || target.value === "") return;
  const inside = Math.min(Math.max(Number(target.value), Number(target.min)), Number(target.max));
  if (inside === Number(target.value)) return;
  target.value = inside;
  target.dispatchEvent(new Event("input", { bubbles: true }));
}

// What opens a tab of the right column: its icon, and its name where there is room.
const opener = (name, tab) => h("button", { type: "button", class: "opener", title: TEXT[tab], "aria-label": TEXT[`show_${tab}`],
  onclick: () => toggleTab(tab) }, icon(name), h("span", {}, TEXT[tab]));
