// One message: who, thinking, text, what it cost, and what can be done with it.
import { TEXT, api, button, h, icon, say } from "/ui/floe.js";
import { preview } from "/ui/conversation/preview.js";

export function message(m) {
  const running = m.status === "running";
  const node = h("article", { class: `message ${m.role}${running ? " running" : ""}`, "data-id": m.id,
    "aria-label": m.role === "user" ? TEXT.you : TEXT.assistant });
  if (m.attachments.length)
    node.append(h("div", { class: "files" }, ...m.attachments.map((file, i) => h("span", { class: "file" },
      h("button", { type: "button", class: "file-name", onclick: () => look(m.id, i) }, file.name)))));
  if (m.role === "assistant") node.append(thought(m, running));
  node.append(h("div", { class: "answer md", dir: "auto", html: m.html }));
  if (m.role === "assistant") {
    node.append(h("div", { class: "phase", hidden: !running }, TEXT.waiting_for_model));
    node.append(...notes(m));
  }
  node.append(h("div", { class: "foot" }));
  if (m.role === "assistant") showStats(node, m.stats);
  return node;
}

const look = async (id, i) => preview(await api("GET", `/api/messages/${id}/attachments/${i}`));

// What is longer than a screen is shown by its beginning, until all of it is asked for; the newest answer is always whole.
// All are measured before any is folded: the page is laid out once.
export function foldLong(log, screen) {
  const messages = [...log.querySelectorAll(".message:not(.running)")], newest = log.querySelectorAll(".message.assistant");
  const long = (node) => node !== newest[newest.length - 1] && !node.querySelector(".unfold")
    && node.querySelector(".answer")?.scrollHeight > screen;
  if (screen) messages.filter(long).forEach((node) => fold(node.querySelector(".answer")));
}

function fold(answer) {
  const more = h("button", { type: "button", class: "quiet unfold", "aria-expanded": "false", onclick: () => {
    const folded = answer.classList.toggle("folded");
    more.textContent = folded ? TEXT.show_all : TEXT.show_less;
    more.setAttribute("aria-expanded", String(!folded));
  } }, TEXT.show_all);
  answer.classList.add("folded");
  answer.after(more);
}

// What can be done with it depends on whether it is the last one.
export function offerActions(node, m, last, act) {
  if (node.last === last || m.status === "running") return;
  node.last = last;
  node.querySelector(".foot > .actions")?.remove();
  node.querySelector(".foot").prepend(actions(m, last, act, node));
}

function thought(m, running) {
  const label = m.stats.thinking_s ? say("thought_for", { s: m.stats.thinking_s.toFixed(1) }) : TEXT.thinking;
  return h("details", { class: "thought", hidden: !m.thinking_html },
    h("summary", {}, running ? TEXT.thinking_now : label), h("div", { class: "md", dir: "auto", html: m.thinking_html }));
}

export function showThinking(node, update) {
  const details = node.querySelector(".thought");
  details.hidden = update.thinking_blocks.length === 0 && update.thinking_from === 0;
  const thinking = update.blocks.length === 0 && update.from === 0;
  details.querySelector("summary").textContent = thinking ? TEXT.thinking_now
    : say("thought_for", { s: (update.stats.thinking_s || 0).toFixed(1) });
  const phase = node.querySelector(".phase");
  phase.hidden = update.phase === "decode";
  const n = update.stats.prefilled;
  phase.textContent = update.phase === "loading" ? TEXT.waiting_for_model
    : update.phase === "asked" ? say("waiting_for_server", { host: update.stats.server }) : n ? say("prefill_n", { n }) : TEXT.prefill;
}

function notes(m) {
  const found = [];
  if (m.stats.dropped) found.push(say("dropped", { n: m.stats.dropped }));
  if (m.stats.folded) found.push(TEXT.system_folded);
  if (m.stats.certain) found.push(TEXT.same_again);
  if (m.stats.edited) found.push(TEXT.edited);
  if (m.status === "error") found.push(m.stats.error || TEXT.status_error);
  else if (["stopped", "length", "interrupted"].includes(m.status)) found.push(TEXT[`status_${m.status}`]);
  return found.map((text) => h("p", { class: `note ${m.status}` }, text));
}

// How fast and how long; the rest of what it cost lies behind it.
export function showStats(node, stats) {
  const foot = node.querySelector(".foot"), old = foot.querySelector(".stats");
  if (stats.lossy && !foot.querySelector(".lossy")) foot.append(approximate(stats.lossy));
  const short = [stats.tokens_per_second && say("stat_decode", { n: stats.tokens_per_second.toFixed(1) }),
    stats.seconds && say("stat_seconds", { s: stats.seconds.toFixed(1) })].filter(Boolean).join(" · ");
  if (!short) return;
  const details = old || h("details", { class: "stats" }, h("summary", { title: TEXT.stats_more }, short, icon("info")), h("ul", {}));
  details.firstChild.firstChild.data = short;
  details.lastChild.replaceChildren(...statsLine(stats));
  if (!old) foot.append(details);
}

// Words that a saving of bytes may have changed.
function approximate(how) {
  const why = say("lossy_why", { how: TEXT[`preset_${how}`] || how });
  return h("span", { class: "lossy", title: why }, TEXT.lossy, h("span", { class: "sr-only" }, ` ${why}`));
}

function statsLine(stats) {
  const far = stats.far_bytes_per_token / 1e6;
  return [
    stats.first_token_ms !== undefined && say("stat_first", { ms: `${Math.round(stats.first_token_ms)} ms` }),
    stats.prefill_tokens_per_second && say("stat_prefill", { n: stats.prefill_tokens_per_second.toFixed(0) }),
    stats.tokens && say("stat_tokens", { n: stats.tokens }),
    stats.hit_rate !== undefined && stats.tokens && say("stat_hit", { n: (100 * stats.hit_rate).toFixed(0) }),
    stats.far_bytes_per_token !== undefined && say("stat_far", { mb: far.toFixed(far < 0.1 ? 3 : 2) }),
    stats.model,
    stats.server || stats.level,
  ].filter(Boolean).map((text) => h("li", {}, text));
}

function actions(m, last, act, node) {
  const row = h("div", { class: "actions" });
  const i = m.versions.indexOf(m.id), n = m.versions.length;
  if (n > 1)
    row.append(button("left", TEXT.previous_version, () => act("show", m.id, m.versions[i - 1]), { disabled: i === 0 }),
      h("span", { class: "version", "aria-label": say("version", { i: i + 1, n }) }, `${i + 1}/${n}`),
      button("right", TEXT.next_version, () => act("show", m.id, m.versions[i + 1]), { disabled: i === n - 1 }));
  row.append(button("copy", TEXT.copy, () => act("copy", m.id)), button("edit", TEXT.edit, () => edit(m, node, act)));
  if (m.role === "assistant") {
    row.append(button("again", TEXT.regenerate, () => act("regenerate", m.id)));
    if (last) row.append(button("go", TEXT.continue, () => act("continue", m.id)));
  } else if (last) row.append(button("again", TEXT.regenerate, () => act("regenerate", m.id)));
  row.append(button("branch", TEXT.branch, () => act("branch", m.id)));
  return row;
}

async function edit(m, node, act) {
  const { text } = await api("GET", `/api/messages/${m.id}`);
  const area = h("textarea", { "aria-label": TEXT.edit, dir: "auto", rows: Math.min(14, text.split("\n").length + 1) });
  area.value = text;
  const answer = node.querySelector(".answer");
  const form = h("div", { class: "editing" }, area, h("div", { class: "edit-buttons" },
    h("button", { type: "button", class: "quiet", onclick: cancel }, TEXT.cancel),
    h("button", { type: "button", class: "primary", onclick: () => act("edit", m.id, { text: area.value }) }, TEXT.save)));
  function cancel() { form.replaceWith(answer); }
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) act("edit", m.id, { text: area.value });
  });
  answer.replaceWith(form);
  area.focus();
}
