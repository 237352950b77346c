// The live panel: what the engine does, drawn as SVG from the event stream. Numbers arrive ready; nothing is invented:
// what the engine does not report is shown as a dash.
import { TEXT, button, h, on, ready, say, start, state } from "/ui/floe.js";

const POINTS = 120;

export async function mount(root, trigger) {
  await ready;
  let paused = false;
  const speed = curve("speed", TEXT.speed, TEXT.tokens_per_second);
  const link = curve("link", TEXT.link, TEXT.mb_per_second);
  const model = h("p", { class: "model-line", id: "model-line" });
  const device = h("p", { class: "device-line", id: "device-line" });
  const facts = h("dl", { class: "facts" });
  const layers = h("div", { class: "layers", role: "img", "aria-label": TEXT.residency });
  const memory = h("div", { class: "memory" });
  const totals = h("dl", { class: "totals", id: "totals" });
  const pause = h("button", { type: "button", class: "quiet", "aria-pressed": "false", onclick: () => {
    paused = !paused;
    pause.textContent = paused ? TEXT.go_on : TEXT.pause;
    pause.setAttribute("aria-pressed", String(paused));
  } }, TEXT.pause);
  root.replaceChildren(h("section", { class: "panel", "aria-label": TEXT.tab_engine },
    h("div", { class: "panel-head" }, model, pause), device, speed.node, link.node, facts,
    h("h2", {}, TEXT.residency), layers, h("h2", {}, TEXT.memory), memory, h("h2", {}, TEXT.totals), totals));

  function draw(stats) {
    if (paused) return;
    speed.push(stats.phase === "decode" ? stats.tokens_per_second || 0 : 0, stats.tokens_per_second || 0);
    link.push((stats.far_bytes_per_second || 0) / 1e6);
    model.textContent = `${stats.model || state.model.name || ""} · ${TEXT[`phase_${phase(stats)}`]}`;
    device.textContent = deviceLine(stats);
    drawFacts(facts, stats);
    drawLayers(layers, stats.residency || []);
    drawMemory(memory, stats);
    drawTotals(totals, stats);
  }

  on("stats", draw);
  on("history", (samples) => samples.forEach((sample) => {
    speed.remember(sample.tokens_per_second);
    link.remember(sample.far_bytes_per_second / 1e6);
  }));
  on("state", ({ now, before }) => {
    if (before.model.state !== now.model.state) trigger("change");
  });
  start();
}

const phase = (stats) => (stats.state === "ready" ? stats.phase || "idle" : stats.state || "loading");

function deviceLine(stats) {
  if (!stats.device) return stats.step || "";
  return stats.device === "cuda" ? TEXT.device_cuda : TEXT.device_cpu;
}

function curve(id, title, unit) {
  const values = [];
  const number = h("strong", { id: `${id}-now` }, "–");
  const node = h("figure", { class: `curve ${id}` }, h("figcaption", {}, title, h("span", {}, number, ` ${unit}`)));
  const picture = h("div", { role: "img", "aria-label": `${title}, ${unit}` });
  node.append(picture);
  const remember = (value) => {
    values.push(value);
    if (values.length > POINTS) values.shift();
  };
  return {
    node, remember,
    push(value, shown = value) {
      remember(value);
      number.textContent = shown >= 100 ? shown.toFixed(0) : shown.toFixed(1);
      picture.innerHTML = svgCurve(values);
    },
  };
}

function svgCurve(values) {
  const top = Math.max(...values, 1e-9), x = (i) => (300 * (i + POINTS - values.length)) / (POINTS - 1);
  const line = values.map((value, i) => `${x(i).toFixed(1)},${(47 - (44 * value) / top).toFixed(1)}`).join(" ");
  const start = x(0).toFixed(1);
  return `<svg viewBox="0 0 300 48" preserveAspectRatio="none"><polygon points="${start},48 ${line} 300,48"/>
    <polyline points="${line}"/></svg>`;
}

function drawFacts(place, stats) {
  const last = stats.last || {}, counters = stats.counters || {};
  const rate = counters.needed_bytes ? counters.hit_bytes / counters.needed_bytes : null;
  const moved = last.needed_bytes === undefined ? null : (last.far_bytes || 0) + (last.speculative_bytes || 0);
  replace(place, [
    [TEXT.hit_rate, rate === null ? "–" : `${(100 * rate).toFixed(1)} %`],
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

export function bytes(n) {
  if (n === undefined || n === null || Number.isNaN(n)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1000; i += 1; }
  return `${i === 0 ? Math.round(n) : n.toFixed(n < 10 ? 2 : 1)} ${units[i]}`;
}
