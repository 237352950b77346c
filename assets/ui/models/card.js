// A card of the Models page: name, verdict, one line, the sizes, the speed, what can be done, and the plan on demand.
import { TEXT, bytes, duration, h, rate, say } from "/ui/floe.js";

// model: {name, title, verdict, recommended, tokens_per_second}; the verdict may come later: see `judge`.
export function card(model, { about, facts = [], buttons = [], below = [], badges = [] }) {
  const node = h("li", { class: "card", "data-name": model.name },
    h("div", { class: "card-row" },
      h("div", { class: "grow" },
        h("div", { class: "card-head" }, h("h3", {}, model.title || model.name), ...badges, h("span", { class: "verdict" })),
        about && h("p", { class: "card-about" }, about),
        h("p", { class: "card-facts" })),
      h("div", { class: "card-speed" }),
      h("div", { class: "model-buttons" }, ...buttons)), ...below);
  setFacts(node, facts);
  judge(node, model);
  return node;
}

export const setFacts = (node, facts) => node.querySelector(".card-facts")
  .replaceChildren(...facts.filter(Boolean).map((fact) => h("span", {}, fact)));

// Verdict and speed of a card, as soon as they are known.
export function judge(node, { verdict, recommended, tokens_per_second: speed }) {
  const badge = node.querySelector(".card-head .verdict:last-child");
  const shown = recommended ? "recommended" : verdict;
  badge.hidden = !verdict;
  badge.className = `verdict ${shown || ""}`;
  badge.textContent = verdict ? TEXT[`verdict_${shown}`] : "";
  node.classList.toggle("dimmed", verdict === "no");
  const runs = speed && verdict !== "no" && verdict !== "unknown";
  node.querySelector(".card-speed").replaceChildren(...(runs
    ? [h("strong", {}, rate(speed)), ` ${TEXT.tokens_per_second}`, h("small", {}, TEXT.predicted)] : []));
}

// Whether a model is worth a primary button.
export const practical = ({ verdict }) => verdict === "fits" || verdict === "slow";

export const quiet = (text, onclick, name = "quiet") => h("button", { type: "button", class: name, onclick }, text);

// What has to be fetched, and how long that takes at the speed that earlier downloads had here.
export function toFetch(n_bytes, speed) {
  const time = speed ? say("fetch_time", { time: duration(n_bytes / speed) }) : TEXT.fetch_time_unknown;
  return say("fetch_size", { size: bytes(n_bytes), time });
}
