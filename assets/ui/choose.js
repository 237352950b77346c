// Level and context of one model, with the plan's words for this computer beside them while they are changed.
import { TEXT, api, h } from "/ui/floe.js";

const WAIT_MS = 200;

export function choose(model, open) {
  const level = h("select", { "aria-label": `${TEXT.choose_level}: ${model.name}`, onchange: ask });
  const context = h("input", { type: "number", min: 256, step: 256, "aria-label": `${TEXT.choose_context}: ${model.name}`,
    oninput: () => { clearTimeout(waiting); waiting = setTimeout(ask, WAIT_MS); } });
  const range = h("input", { type: "range", "aria-label": `${TEXT.choose_context}: ${model.name}`, min: 0, max: 100,
    oninput: () => { context.value = atShare(range.value / 100); context.dispatchEvent(new Event("input")); } });
  const text = h("pre", { class: "plan", tabindex: "0", role: "status" });
  let waiting, longest = 0, asked = 0;

  // The range is logarithmic: 512 tokens to the model's longest context.
  const least = () => Math.min(512, longest);
  const atShare = (share) => Math.round(least() * (longest / least()) ** share / 64) * 64 || least();

  async function ask() {
    const turn = ++asked;
    const wish = new URLSearchParams({ name: model.name, level: level.value });
    if (context.value) wish.set("context", context.value);
    const plan = await api("GET", `/api/models/plan?${wish}`);
    if (turn === asked) draw(plan);
  }

  function draw(plan) {
    if (!longest) {
      longest = plan.longest;
      level.replaceChildren(h("option", { value: "" }, TEXT.level_auto),
        ...plan.levels.map((name) => h("option", { value: name }, name)));
      context.max = longest;
      context.value = plan.context;
    }
    const share = Math.log(plan.context / least()) / Math.log(longest / least());
    range.value = longest > least() ? 100 * Math.min(1, Math.max(0, share)) : 100;
    text.dataset.verdict = plan.verdict;
    text.textContent = plan.text;
  }

  const details = h("details", { class: "choose" }, h("summary", {}, TEXT.choose),
    h("label", {}, h("span", {}, TEXT.choose_level), level),
    h("label", {}, h("span", {}, TEXT.choose_context), context), range, text,
    open && h("div", { class: "model-buttons" }, h("button", { type: "button", class: "quiet", onclick: () =>
      open(model.name, level.value, Number(context.value) || null) }, TEXT.open_so)));
  details.addEventListener("toggle", () => { if (details.open && !longest) ask(); });
  return details;
}
