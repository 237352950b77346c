// The first page a person sees: what it should be good at, the three models that suit this computer, one click to
// fetch one while the demonstration answers. Skippable, remembered by the program, and reachable again.
import { TEXT, api, bytes, h, icon, notice, on, rate, say, state } from "/ui/floe.js";

const AIMS = ["fast", "best", "coding", "long"];
const ICONS = { fast: "bolt", best: "star", coding: "code", long: "book" };

export function welcome(chat) {
  const place = h("section", { class: "welcome", id: "welcome", "aria-labelledby": "welcome-title", hidden: true });
  let wanted = false, over = false; // over: done with in this tab, whatever an older state still says

  function show(open) {
    place.hidden = !open;
    chat().classList.toggle("welcoming", open);
    if (open && !place.firstChild) ask();
    if (!open) place.replaceChildren();
  }

  function ask() {
    place.replaceChildren(h("h2", { id: "welcome-title" }, TEXT.welcome), h("p", {}, TEXT.welcome_text),
      h("div", { class: "aims" }, ...AIMS.map((aim) => h("button", { type: "button", class: "aim", "data-aim": aim,
        onclick: () => offer(aim) }, icon(ICONS[aim]), TEXT[`aim_${aim}`]))), foot());
  }

  async function offer(aim) {
    place.replaceChildren(h("h2", { id: "welcome-title" }, TEXT[`aim_${aim}`]), h("span", { class: "spinner" }));
    const { offers } = await api("GET", "/api/models");
    const suiting = offers.filter((each) => each.verdict !== "no");
    const best = [...suiting.filter((each) => each.good_for.includes(aim)),
      ...suiting.filter((each) => !each.good_for.includes(aim))].slice(0, 3);
    place.replaceChildren(h("h2", { id: "welcome-title" }, TEXT[`aim_${aim}`]),
      best.length ? h("ul", { class: "models fits" }, ...best.map(row)) : h("p", {}, TEXT.welcome_none),
      foot(h("button", { type: "button", class: "quiet", onclick: ask }, TEXT.welcome_back)));
  }

  function row(model) {
    return h("li", { "data-name": model.name }, h("div", { class: "model-head" }, h("strong", {}, model.title),
      h("span", { class: `verdict ${model.verdict}` }, TEXT[`verdict_${model.verdict}`])), h("p", {}, model.about),
      h("div", { class: "model-buttons" }, h("span", { class: "amount" }, [say("expected",
        { n: rate(model.tokens_per_second) }), bytes(model.download_bytes), model.licence].join(" · ")),
        h("button", { type: "button", class: "primary", onclick: () => begin(model) }, TEXT.fetch)));
  }

  async function begin(model) {
    await api("POST", "/api/models/download", { name: model.name });
    notice(say("welcome_begun", { name: model.title }));
    await done();
  }

  const foot = (...more) => h("div", { class: "welcome-foot" }, ...more,
    h("button", { type: "button", class: "quiet", id: "welcome-skip", onclick: done }, TEXT.welcome_skip));

  async function done() {
    wanted = false;
    over = true;
    show(false);
    if (state.welcome !== false) await api("POST", "/api/welcomed", { done: true });
  }

  on("state", ({ now }) => show(wanted || (now.welcome && !over)));
  on("welcome", () => {
    wanted = true;
    document.body.classList.remove("show-right");
    show(true);
  });
  on("sent", () => !over && done()); // before it was even shown, perhaps
  on("opened", () => !place.hidden && done());
  return place;
}
