// The conversations on the left: new, search, open, pin, rename, delete with undo, export, import.
import { placeMenu } from "/ui/dismiss.js";
import { importing, take } from "/ui/conversation/import.js";
import { droppable } from "/ui/drop.js";
import { TEXT, api, download, emit, h, icon, keep, notice, on, opened, ready, start, state } from "/ui/floe.js";

export async function mount(root) {
  await ready;
  const search = h("input", { type: "search", dir: "auto", placeholder: TEXT.search, "aria-label": TEXT.search, id: "search", maxlength: 1000,
    oninput: () => { clearTimeout(search.timer); search.timer = setTimeout(look, 150); },
    onkeydown: (event) => { if (event.key === "Escape") { search.value = ""; look(); } } });
  const list = h("ul", { class: "conversations", "aria-label": TEXT.conversations, onscroll: followRow });
  const { files, far } = importing();
  root.replaceChildren(
    h("nav", { class: "list", "aria-label": TEXT.conversations },
      h("div", { class: "brand" }, icon("wave"), h("span", {}, TEXT.app)),
      h("button", { type: "button", class: "primary wide", id: "new-chat", onclick: newChat }, icon("plus"), TEXT.new_chat),
      h("div", { class: "search" }, icon("search"), search),
      h("a", { class: "page-link", href: "#models" }, icon("models"), TEXT.page_models),
      h("a", { class: "page-link", href: "#settings" }, icon("settings"), TEXT.page_settings),
      list,
      h("div", { class: "list-foot" }, files, far,
        h("button", { type: "button", class: "quiet", title: TEXT.import_drop, onclick: () => files.click() }, TEXT.import),
        h("button", { type: "button", class: "quiet", onclick: () => download("/api/export") }, TEXT.export_all))));

  droppable(root.firstChild, ["Files"], ({ files: dropped }) => take([...dropped]));

  async function look() {
    if (!search.value.trim()) return draw();
    const found = await api("GET", `/api/search?q=${encodeURIComponent(search.value)}`);
    list.replaceChildren(...found.map(foundItem));
    if (!found.length) list.replaceChildren(h("li", { class: "empty" }, TEXT.search_none));
  }

  function draw() {
    if (search.value.trim() || list.querySelector("input, details[open]")) return;
    const midnight = new Date().setHours(0, 0, 0, 0);
    const rows = state.conversations.map(({ id, title, pinned, updated_at: at }) => ({ id, title, pinned, current: id === opened.id,
      busy: id === state.live?.conversation, when: pinned ? TEXT.pinned : dayOf(at, midnight) }));
    const shown = rows.flatMap((row, i) => [row.when !== rows[i - 1]?.when && [`when ${row.when}`, row.when], [JSON.stringify(row), row]]);
    keep(list, shown.length ? shown.filter(Boolean) : [["", null]], item);
  }

  on("state", draw);
  on("opened", () => { document.body.classList.remove("show-left"); draw(); });
  on("new-chat", newChat);
  on("search", () => { document.body.classList.add("show-left"); search.focus(); search.select(); });
  start();
  draw();
}

function followRow() {
  for (const menu of document.querySelectorAll(".list details.menu[open]")) placeMenu(menu, menu.lastChild);
}

const MONTH = new Intl.DateTimeFormat("en", { month: "long", year: "numeric" }); // made once: the list is drawn at every event

// Under which heading a conversation stands, by the day of its last message. seconds: since 1970.
function dayOf(seconds, midnight) {
  const then = new Date(1000 * seconds);
  const days = Math.ceil((midnight - then) / 86_400_000);
  if (days <= 0) return TEXT.today;
  if (days === 1) return TEXT.yesterday;
  if (days <= 7) return TEXT.last_week;
  return days <= 30 ? TEXT.last_month : MONTH.format(then);
}

function newChat() {
  opened.id = null; // a conversation exists once its first message was sent
  emit("focus");
}

function foundItem(found) {
  const snippet = h("span", { class: "snippet" });
  for (const part of found.snippet.split(/(\u0002[^\u0003]*\u0003)/))
    snippet.append(part.startsWith("\u0002") ? h("mark", {}, part.slice(1, -1)) : part);
  return h("li", {}, h("button", { type: "button", class: "open", onclick: () => {
    emit("goal", found.message_id);
    opened.id = found.id;
  } }, h("span", { class: "title" }, found.title || TEXT.untitled), snippet));
}

function item(conversation) {
  if (!conversation) return h("li", { class: "empty" }, TEXT.no_conversations);
  if (typeof conversation === "string") return h("li", { class: "when" }, conversation);
  const { current, busy } = conversation;
  const open = h("button", { type: "button", class: "open", "aria-current": current ? "page" : null,
    onclick: () => { opened.id = conversation.id; } },
    conversation.pinned && h("span", { class: "pinned", title: TEXT.pinned }, icon("pin")),
    h("span", { class: "title" }, conversation.title || TEXT.untitled),
    busy && h("span", { class: "dot", title: TEXT.phase_decode }));
  const row = h("li", { class: current ? "current" : "", "data-id": conversation.id }, open, menu(conversation, () => row));
  return row;
}

function menu(conversation, row) {
  const path = `/api/conversations/${conversation.id}`;
  const entry = (label, act) => h("button", { type: "button", onclick: (event) => {
    event.target.closest("details").open = false;
    act();
  } }, label);
  const details = h("details", { class: "menu" },
    h("summary", { "aria-label": `${TEXT.more}: ${conversation.title || TEXT.untitled}`, title: TEXT.more }, icon("more")),
    h("div", { class: "menu-items" },
      entry(conversation.pinned ? TEXT.unpin : TEXT.pin, () => api("PATCH", path, { pinned: !conversation.pinned })),
      entry(TEXT.rename, () => rename(conversation, row())),
      entry(TEXT.export_json, () => download(`${path}/export.json`)),
      entry(TEXT.export_markdown, () => download(`${path}/export.md`)),
      entry(TEXT.delete, () => remove(conversation))));
  details.addEventListener("focusout", (event) => {
    if (!details.contains(event.relatedTarget)) details.open = false;
  });
  details.addEventListener("toggle", () => {
    if (details.open) placeMenu(details, details.lastChild);
    else again(); // what changed meanwhile
  });
  return details;
}

function rename(conversation, row) {
  const input = h("input", { value: conversation.title, maxlength: 200, "aria-label": TEXT.rename, dir: "auto", class: "rename" });
  const finish = async (keep) => {
    input.replaceWith(row.shown);
    if (keep && input.value.trim()) await api("PATCH", `/api/conversations/${conversation.id}`, { title: input.value });
    else again();
  };
  row.shown = row.querySelector(".open");
  row.shown.replaceWith(input);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  input.focus();
  input.select();
}

const again = () => emit("state", { now: state, before: state });

async function remove(conversation) {
  await api("DELETE", `/api/conversations/${conversation.id}`);
  if (opened.id === conversation.id) opened.id = null;
  notice(TEXT.deleted, [TEXT.undo, async () => {
    await api("POST", `/api/conversations/${conversation.id}/restore`);
    opened.id = conversation.id;
  }]);
}
