// The live panel: what the engine does, drawn as SVG from the event stream. Numbers arrive ready; nothing is invented:
// what the engine does not report is shown as a dash.
import { TEXT, api, bytes, h, on, opened, ready, say, start, state } from "/ui/floe.js";

const POINTS = 120;

export async function mount(root, trigger) {
  await ready;
  let paused = false;
  const speed = curve("speed", TEXT.speed, TEXT.tokens_per_second);
  const link = curve("link", TEXT.link, TEXT.mb_per_second);
  const cardLink = h("p", { class: "device-line", id: "card-link" });
  const why = h("p", { class: "why", id: "why" });
  const model = h("p", { class: "model-line", id: "model-line" });
  const device = h("p", { class: "device-line", id: "device-line" });
  const facts = h("dl", { class: "facts" });
  const heat = h("div", { class: "heat", id: "heat", role: "img", "aria-label": TEXT.activity_none });
  const picks = h("div", { class: "heat", id: "picks", role: "img", "aria-label": TEXT.picks_none });
  const layers = h("div", { class: "layers", role: "img", "aria-label": TEXT.residency });
  const memory = h("div", { class: "memory" });
  const totals = h("dl", { class: "totals", id: "totals" });
  const pause = h("button", { type: "button", class: "quiet", "aria-pressed": "false", onclick: () => {
    paused = !paused;
    pause.textContent = paused ? TEXT.unfreeze : TEXT.freeze;
    pause.setAttribute("aria-pressed", String(paused));
  } }, TEXT.freeze);
  const away = h("p", { class: "away" });
  root.replaceChildren(h("section", { class: "panel", "aria-label": TEXT.tab_engine }, away,
    h("div", { class: "panel-head" }, model, pause), device, speed.node, link.node, cardLink, facts,
    h("h2", {}, TEXT.why), why, h("h2", {}, TEXT.activity), heat, h("h2", {}, TEXT.picks), picks, h("h2", {}, TEXT.residency), layers, h("h2", {}, TEXT.memory), memory, h("h2", {}, TEXT.totals), totals));

  function draw(stats) {
    if (paused) return;
    speed.push(stats.phase === "decode" ? stats.tokens_per_second || 0 : 0);
    const toCard = stats.card?.to_card ?? null;
    link.push((stats.far_bytes_per_second || 0) / 1e6, toCard === null ? null : toCard / 1e6);
    cardLink.textContent = cardLine(stats.card);
    if (stats.why !== undefined) drawWhy(why, stats.why);
    if (stats.activity) drawHeat(heat, stats.activity, TEXT.activity_none, TEXT.activity_label);
    model.textContent = `${state.model.title || ""} · ${TEXT[`phase_${phase(stats)}`]}`;
    device.textContent = [state.graphics?.text || stats.step || TEXT.gpu_unknown, stats.note].filter(Boolean).join(" ");
    drawFacts(facts, stats);
    drawLayers(layers, stats.residency || []);
    drawMemory(memory, stats);
    drawTotals(totals, stats);
  }

  // Of the conversation that is open; kept by the program after each of its answers.
  async function drawPicks() {
    const id = opened.id, there = state.conversations?.some((one) => one.id === id);
    const { shares } = there ? await api("GET", `/api/conversations/${id}/picks`).catch(() => ({ shares: [] })) : { shares: [] };
    if (id === opened.id) drawHeat(picks, shares, TEXT.picks_none, TEXT.picks_label);
  }

  on("stats", draw);
  on("opened", drawPicks);
  on("elsewhere", (name) => { away.textContent = name && say("answered_elsewhere", { model: name, host: state.server }); });
  on("history", (samples) => samples.forEach((sample) => {
    speed.remember(sample.tokens_per_second);
    link.remember(sample.far_bytes_per_second / 1e6, sample.to_card === null ? null : sample.to_card / 1e6);
  }));
  on("state", ({ now, before }) => {
    const set = ({ model, level }) => `${model.state} ${level} ${model.near_bytes}`;
    if (set(before) !== set(now)) trigger("change");
    const written = ({ model, live, conversations }) => `${model.name} ${model.state} ${live?.message} ${conversations?.length}`;
    if (written(before) !== written(now)) drawPicks();
  });
  start();
}

const phase = (stats) => (stats.state === "ready" ? stats.phase || "idle" : stats.state || "loading");

// What the card itself counts, or in words why there is no such number.
function cardLine(card) {
  if (!card) return "";
  if (card.to_card === null) return card.reason;
  const line = say("card_link_line", { to: `${bytes(card.to_card)}/s`, back: `${bytes(card.from_card)}/s` });
  return `${TEXT.card_link}: ${line}`;
}

function drawWhy(place, why) {
  place.dataset.bound = why ? why.bound : "";
  place.textContent = why ? why.text : TEXT.why_none;
}

// A layer is a row, an expert a column. Cells of one shade are one path, so that 6,000 of them are a dozen nodes.
const SHADES = 8;
function drawHeat(place, rows, none, label) {
  const n = rows[0]?.length || 0, most = Math.max(0, ...rows.flat());
  if (!most) {
    place.replaceChildren(none);
    place.setAttribute("aria-label", none);
    return;
  }
  const paths = Array.from({ length: SHADES + 1 }, () => "");
  rows.forEach((row, y) => row.forEach((share, x) => {
    paths[share ? Math.ceil((SHADES * share) / most) : 0] += `M${x} ${y}h.9v.9h-.9z`;
  }));
  place.innerHTML = `<svg viewBox="0 0 ${n} ${rows.length}" preserveAspectRatio="none">${paths.map((d, shade) =>
    d && `<path data-shade="${shade}" style="opacity:${shade ? 0.2 + (0.8 * shade) / SHADES : 1}" d="${d}"/>`).join("")}</svg>`;
  const layer = rows.findIndex((row) => row.includes(most)), expert = rows[layer].indexOf(most);
  place.setAttribute("aria-label", say(label, { layers: rows.length, experts: n, layer, expert,
    percent: Math.round(100 * most) }));
  place.title = place.getAttribute("aria-label");
}

// other: a second line of the same kind, drawn beside the first where it is known (null: it is not).
function curve(id, title, unit) {
  const values = [], others = [];
  const node = h("figure", { class: `curve ${id}` }, h("figcaption", {}, title, h("span", {}, unit)));
  const picture = h("div", { role: "img", "aria-label": `${title}, ${unit}` });
  node.append(picture);
  const remember = (value, other = null) => {
    values.push(value);
    others.push(other);
    if (values.length > POINTS) {
      values.shift();
      others.shift();
    }
  };
  return {
    node, remember,
    push(value, other = null) {
      remember(value, other);
      picture.innerHTML = svgCurve(values, others);
    },
  };
}

function svgCurve(values, others) {
  const known = others.filter((value) => value !== null);
  const top = Math.max(...values, ...known, 1e-9), x = (i) => (300 * (i + POINTS - values.length)) / (POINTS - 1);
  const line = (list) => list.map((value, i) => (value === null ? "" :
    `${x(i).toFixed(1)},${(47 - (44 * value) / top).toFixed(1)}`)).filter(Boolean).join(" ");
  const start = x(0).toFixed(1), first = line(values);
  return `<svg viewBox="0 0 300 48" preserveAspectRatio="none"><polygon points="${start},48 ${first} 300,48"/>
    <polyline points="${first}"/>${known.length ? `<polyline class="card" points="${line(others)}"/>` : ""}</svg>`;
}

function drawFacts(place, stats) {
  const last = stats.last || {};
  const moved = last.needed_bytes === undefined ? null : (last.far_bytes || 0) + (last.speculative_bytes || 0);
  replace(place, [
    [TEXT.bytes_per_token, moved === null ? "–" : bytes(moved)],
    [TEXT.level, stats.level || "–"],
  ]);
}

function drawLayers(place, residency) {
  const width = 300 / Math.max(1, residency.length);
  place.innerHTML = `<svg viewBox="0 0 300 56" preserveAspectRatio="none">${residency.map((share, i) =>
    `<rect class="all" x="${(i * width).toFixed(2)}" y="0" width="${(width * 0.86).toFixed(2)}" height="56" rx="2"/>
     <rect class="near" x="${(i * width).toFixed(2)}" y="${(56 * (1 - share)).toFixed(2)}"
       width="${(width * 0.86).toFixed(2)}" height="${(56 * share).toFixed(2)}" rx="2"/>`).join("")}</svg>`;
  place.setAttribute("aria-label", `${TEXT.residency}: ${residency.map((s) => `${Math.round(100 * s)} %`).join(", ")}`);
}

function drawMemory(place, stats) {
  const rows = [
    [TEXT.near_memory, stats.near_used_bytes, stats.near_bytes],
    ...(stats.resting_bytes ? [[TEXT.resting, stats.resting_bytes, stats.resting_most_bytes]] : []),
    ...(stats.card?.vram_total_bytes ? [[TEXT.vram, stats.card.vram_used_bytes, stats.card.vram_total_bytes]] : []),
    [TEXT.process, stats.process_bytes, stats.ram_total_bytes],
    [TEXT.machine, stats.ram_total_bytes - stats.ram_free_bytes, stats.ram_total_bytes],
  ];
  place.replaceChildren(...rows.map(([name, used, total]) => h("div", { class: "bar-row" },
    h("span", {}, name), h("span", { class: "amount" }, total ? `${bytes(used)} / ${bytes(total)}` : "–"),
    h("span", { class: "meter-bar", style: `--share:${total ? Math.min(1, used / total) : 0}` }))));
}

function drawTotals(place, stats) {
  const counters = stats.counters || {};
  const names = ["needed", "hit", "far", "speculative", "wasted"];
  replace(place, [...names.map((name) => {
    const value = counters[`${name}_bytes`];
    return [TEXT[`total_${name}`], value === undefined ? "–" : bytes(value), value];
  }), [TEXT.total_tokens, stats.n_tokens_total === undefined ? "–" : stats.n_tokens_total.toLocaleString("en"),
    stats.n_tokens_total]]);
}

function replace(place, rows) {
  place.replaceChildren(...rows.flatMap(([name, text, value]) =>
    [h("dt", {}, name), h("dd", { "data-value": value === undefined ? null : String(value) }, text)]));
}
