// The plan of a model as pictures, made of its own numbers: where video and main memory go, what a token's time is spent
// on, speed against loss by level; and what can be chosen before it is loaded. Every bar says in words what it shows.
import { TEXT, api, bytes, h, rate, say } from "/ui/floe.js";

const WAIT_MS = 200;
const MIB = 1 << 20;

// load(options): what Load does, for a model of the disk.
export function planDetails(model, load) {
  const pictures = h("div", { class: "pictures" });
  const text = h("pre", { class: "plan", tabindex: "0" });
  const said = h("p", { class: "plan-said", role: "status" });
  const wishes = options(model, load, ask);
  let asked = 0, drawn = false;

  async function ask() {
    const turn = ++asked;
    const plan = await api("GET", `/api/models/plan?${new URLSearchParams({ name: model.name, ...wishes.asked() })}`);
    if (turn === asked) draw(plan);
  }

  function draw(plan) {
    drawn = true;
    wishes.show(plan);
    text.dataset.verdict = plan.verdict;
    text.textContent = plan.text;
    pictures.replaceChildren(...(plan.main ? drawings(plan) : []));
    said.replaceChildren(...sentences(plan));
  }

  const details = h("details", { class: "card-details choose" }, h("summary", {}, TEXT.details), pictures, said,
    h("details", { class: "plan-words" }, h("summary", {}, TEXT.plan_words), text), wishes.node);
  details.addEventListener("toggle", () => { if (details.open && !drawn) ask(); });
  return details;
}

function sentences(plan) {
  if (plan.missing) return [plan.missing, plan.advice?.length ? ` ${say("plan_helps", { what: plan.advice.join("; ") })}` : ""];
  return [h("strong", {}, TEXT.plan_binds), ` ${plan.binds}. `,
    plan.advice.length ? say("plan_better", { what: plan.advice.join("; ") }) : "", plan.programs ? ` ${plan.programs}` : ""];
}

function drawings(plan) {
  const memory = (title, { parts, needed, free }) => bar(title, say("memory_of", { needed: bytes(needed), free: bytes(free) }),
    parts.map(([part, n]) => [part, n, bytes(n)]), free, needed > free);
  const time = plan.token.reduce((sum, [, ms]) => sum + ms, 0);
  return [
    plan.video ? memory(TEXT.video_memory, plan.video) : h("figure", { class: "picture" }, h("figcaption", {}, TEXT.video_memory),
      h("p", { class: "amount" }, TEXT.no_video)),
    memory(TEXT.main_memory, plan.main),
    plan.token.length > 0 && bar(TEXT.one_token, say("milliseconds", { ms: rate(time) }),
      plan.token.map(([part, ms]) => [part, ms, say("milliseconds", { ms: rate(ms) })]), time),
    plan.speeds.some((row) => row.verdict !== "no") && levels(plan),
  ].filter(Boolean);
}

// parts: [name, number, the number in words]; whole: what the bar's full width means, unless the parts need more.
function bar(title, sum, parts, whole, over = false) {
  const used = parts.reduce((all, [, n]) => all + n, 0), scale = Math.max(used, whole);
  const word = (name) => TEXT[`part_${name.replaceAll(" ", "_")}`];
  const pieces = parts.map(([name, n]) => piece(name, n / scale));
  if (scale > used) pieces.push(piece("free", 1 - used / scale));
  const limit = over && h("i", { class: "limit", title: TEXT.part_free });
  if (limit) limit.style.insetInlineStart = `${(100 * whole) / scale}%`;
  return h("figure", { class: "picture" },
    h("figcaption", {}, title, h("span", { class: over ? "amount over" : "amount" }, sum)),
    h("div", { class: "stack", role: "img", "aria-label": `${title}: ${sum}. ${
      parts.map(([name, , words]) => `${word(name)} ${words}`).join(", ")}` }, ...pieces, limit),
    h("ul", { class: "legend" }, ...parts.map(([name, , words]) => h("li", {}, h("i", { class: `part ${css(name)}` }),
      `${word(name)} ${words}`))));
}

const css = (name) => `part-${name.replaceAll(" ", "-")}`;

function piece(name, share) {
  const node = h("i", { class: css(name) });
  node.style.width = `${100 * share}%`;
  return node;
}

function levels({ speeds: rows, level: chosen }) {
  const fastest = Math.max(...rows.map((row) => row.tokens_per_second));
  const speed = (row) => {
    const node = h("i");
    node.style.width = `${(100 * row.tokens_per_second) / fastest}%`;
    return node;
  };
  const runs = rows.filter((row) => row.verdict !== "no");
  return h("figure", { class: "picture" }, h("figcaption", {}, TEXT.levels_chart), h("table", { class: "level-chart" },
    h("thead", { class: "sr-only" }, h("tr", {}, h("th", { scope: "col" }, TEXT.choose_level),
      h("td"), ...[TEXT.speed, TEXT.loss_over].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, ...runs.map((row) => h("tr", { class: row.level === chosen ? "chosen" : "" },
      h("th", { scope: "row" }, row.level),
      h("td", { class: "level-speed", "aria-hidden": "true" }, speed(row)),
      h("td", {}, `${rate(row.tokens_per_second)} ${TEXT.tokens_per_second}`),
      h("td", {}, loss(row)))))),
  h("p", { class: "amount" }, runs.every((row) => row.measured) ? TEXT.loss_measured : TEXT.loss_promised));
}

function loss({ level, loss: share, measured }) {
  if (level === "exact" || share === null) return TEXT.loss_none;
  const percent = (100 * share).toFixed(1).replace(/\.0$/, "");
  return say(measured ? "loss_is" : "loss_most", { percent: `${share >= 0 ? "+" : "−"}${percent.replace("-", "")}` });
}

// Level, context and near memory, each Automatic until it is chosen.
function options(model, load, ask) {
  const label = (name) => `${name}: ${model.title || model.name}`;
  let waiting, longest = 0;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(ask, WAIT_MS); };
  const level = h("select", { "aria-label": label(TEXT.choose_level), onchange: ask });
  const context = h("input", { type: "number", min: 256, step: 256, "aria-label": label(TEXT.choose_context), oninput: soon });
  const range = h("input", { type: "range", "aria-label": label(TEXT.choose_context), min: 0, max: 100,
    oninput: () => { context.value = atShare(range.value / 100); soon(); } });
  const near = h("input", { type: "number", min: 0, step: 1, "aria-label": label(TEXT.near), oninput: soon });

  const preset = h("select", { "aria-label": label(TEXT.choose_preset), onchange: () => explain() });
  const about = h("p", { class: "preset-about", role: "status" });
  let presets = [];

  function explain() {
    const chosen = presets.find((row) => row.name === preset.value);
    about.textContent = chosen ? [TEXT[`preset_about_${chosen.name}`], price(chosen)].filter(Boolean).join(" ") : "";
  }

  function showPresets(rows) {
    const before = preset.value;
    presets = rows;
    preset.replaceChildren(...rows.map((row) => h("option", { value: row.name, disabled: Boolean(row.why_not),
      title: row.why_not || null }, TEXT[`preset_${row.name}`])));
    preset.value = rows.some((row) => row.name === before && !row.why_not) ? before : rows[0].name;
    explain();
  }

  // The range is logarithmic: 512 tokens to the model's longest context.
  const least = () => Math.min(512, longest);
  const atShare = (share) => Math.round(least() * (longest / least()) ** share / 64) * 64 || least();
  const nearBytes = () => (near.value === "" ? null : Math.round(Number(near.value) * MIB));

  function asked() {
    const wish = {};
    if (level.value) wish.level = level.value;
    if (context.value) wish.context = context.value;
    if (nearBytes() !== null) wish.near = nearBytes();
    return wish;
  }

  function show(plan) {
    if (!longest) {
      longest = context.max = plan.longest;
      level.replaceChildren(h("option", { value: "" }, TEXT.level_auto),
        ...plan.levels.map((name) => h("option", { value: name }, name)));
      context.value = plan.context;
    }
    if (!level.value && plan.level) level.options[0].textContent = say("automatic_is", { what: plan.level });
    if (plan.near_bytes && near.value === "")
      near.placeholder = say("automatic_is", { what: Math.round(plan.near_bytes / MIB).toLocaleString("en") });
    if (plan.presets) showPresets(plan.presets);
    const share = Math.log(plan.context / least()) / Math.log(longest / least());
    range.value = longest > least() ? 100 * Math.min(1, Math.max(0, share)) : 100;
  }

  const field = (name, ...controls) => h("label", {}, h("span", {}, name), ...controls);
  const node = h("fieldset", { class: "load-options" }, h("legend", {}, TEXT.choose), field(TEXT.choose_level, level),
    field(TEXT.choose_context, context), range, field(TEXT.near, near),
    load && field(TEXT.choose_preset, preset), load && about,
    load && h("button", { type: "button", class: "primary", onclick: () =>
      load({ level: level.value, context: Number(context.value) || null, near_bytes: nearBytes(),
        preset: preset.value || "lossless" }) }, TEXT.open));
  return { node, asked, show };
}

// What a way to save bytes costs, beside its choice.
function price({ name, cost, why_not }) {
  if (why_not || name === "lossless") return why_not;
  if (!cost) return TEXT.preset_unmeasured;
  const percent = (share) => (100 * share).toFixed(share > 0.1 ? 0 : 1);
  return say("preset_cost", { near: percent(cost.near_share), moved: percent(cost.moved),
    change: `${cost.perplexity < 0 ? "−" : "+"}${percent(Math.abs(cost.perplexity))}`, kl: cost.kl.toFixed(4) });
}
