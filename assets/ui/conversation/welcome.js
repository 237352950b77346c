// The first page a person sees: what it should be good at, the three models that suit this computer, one click to
// fetch one while the demonstration answers. Skippable, remembered by the program, and reachable again.
import { TEXT, api, bytes, h, icon, notice, on, opened, say, state } from "/ui/floe.js";
import { card, practical, quiet, toFetch } from "/ui/models/card.js";

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
    const { offers, fetch_rate: speed } = await api("GET", "/api/models");
    const suiting = offers.filter(practical), fitting = suiting.filter((each) => each.good_for.includes(aim));
    const best = [...fitting, ...suiting.filter((each) => !each.good_for.includes(aim))].slice(0, 3);
    place.replaceChildren(h("h2", { id: "welcome-title" }, TEXT[`aim_${aim}`]),
      ...(best.length && !fitting.length ? [h("p", {}, TEXT.welcome_least)] : []),
      best.length ? h("ul", { class: "cards fits" }, ...best.map(row)) : h("p", {}, TEXT.welcome_none),
      foot(h("button", { type: "button", class: "quiet", onclick: ask }, TEXT.welcome_back)));

    function row(model) {
      return card(model, { about: model.about, facts: [toFetch(model.download_bytes, speed), say("on_disk_size",
        { size: bytes(model.disk_bytes) }), model.licence], buttons: [quiet(TEXT.fetch, () => begin(model), "primary")] });
    }
  }

  async function begin(model) {
    await api("POST", "/api/models/download", { name: model.name, file: "", like: "" });
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
    opened.id = opened.id; // it stands where the conversation does
    document.body.classList.remove("show-right");
    show(true);
  });
  on("sent", () => !over && done()); // before it was even shown, perhaps
  on("opened", () => !place.hidden && done());
  return place;
}
