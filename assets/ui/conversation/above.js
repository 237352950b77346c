// What stands above the conversation: the steps of a model that is being opened, whether the graphics card is used,
// trouble with the disk, and work on models that goes on while a person chats.
import { TEXT, api, button, h, keep, notice, on, say } from "/ui/floe.js";
import { measureLevels, openModel, showWorks, timeLeft, unmeasured } from "/ui/models/page.js";

const HIDDEN = "floe-graphics-hidden";
const AWAY = ["gone", "shut"];

export function above() {
  const banner = h("div", { class: "banner", role: "status" });
  const graphics = h("div", { class: "graphics", id: "graphics", role: "status" });
  const works = h("div", { class: "works", id: "works" });
  let opening = null, received = 0, told = null;

  function drawBanner({ model, disk_trouble: trouble }) {
    const parts = [];
    if (model.state === "loading") parts.push(h("span", { class: "spinner" }), ...steps(model, opening, since()));
    if (model.state === "failed") parts.push(model.step);
    if (AWAY.includes(model.state)) parts.push(TEXT[`away_${model.state}`]);
    if (trouble) parts.push(trouble);
    banner.classList.toggle("bad", ["failed", ...AWAY].includes(model.state) || Boolean(trouble));
    banner.replaceChildren(...parts);
  }

  const since = () => (performance.now() - received) / 1000;

  function drawGraphics(shown) {
    const hidden = !shown || localStorage.getItem(HIDDEN) === shown.text;
    if (hidden || graphics.dataset.text !== shown.text) graphics.replaceChildren();
    graphics.dataset.text = shown?.text || "";
    if (hidden || graphics.firstChild) return;
    graphics.classList.toggle("used", shown.used);
    graphics.append(h("span", {}, shown.text), button("close", TEXT.dismiss, () => {
      localStorage.setItem(HIDDEN, shown.text);
      drawGraphics(shown);
    }));
  }

  function drawWorks(list) {
    const running = list.filter((work) => work.state === "running").map((work) => [work.name, work]);
    keep(works, running, () => h("button", { type: "button", class: "work", onclick: showWorks }), (node, work) => {
      const share = work.total ? work.done / work.total : 0;
      node.style.setProperty("--share", share);
      node.textContent = say("working_on", { name: work.title, percent: Math.floor(100 * share), left: timeLeft(work) });
    });
  }

  function tellFinished(finished) {
    for (const work of told === null ? [] : finished.slice(told)) tellOne(work);
    told = finished.length;
  }

  async function tellOne({ name, title, kind }) {
    const open = [TEXT.open, () => openModel(name)];
    if (kind === "measure") return notice(say("measured", { name: title }), open);
    const { disk } = await api("GET", "/api/models");
    if (!disk.some((model) => model.name === name && unmeasured(model))) return notice(say("made", { name: title }), open);
    return notice(say("made_unmeasured", { name: title }), open, [TEXT.measure, () => measureLevels(name)]);
  }

  on("state", ({ now, before }) => {
    if (now.model.refused && now.model.refused !== before.model.refused) notice(now.model.refused);
    opening = now.model.opening;
    received = performance.now();
    drawBanner(now);
    drawGraphics(now.graphics);
    drawWorks(now.works);
    tellFinished(now.finished);
  });
  setInterval(() => { // the clock goes on between two messages
    const clock = banner.querySelector(".clock");
    if (clock && opening) clock.textContent = time(opening, since());
  }, 500);
  return [banner, graphics, works];
}

function steps(model, opening, seconds) {
  if (!opening) return [model.step];
  const rows = opening.steps.map((step) => h("li", { class: step.state, "aria-label": `${step.name}: ${
    step.state === "done" ? TEXT.step_done : TEXT.step_now}` }, step.name));
  return [h("strong", {}, say("opening", { name: model.title })), h("ol", { class: "steps" }, ...rows),
    h("span", { class: "clock" }, time(opening, seconds))];
}

function time(opening, seconds) {
  if (opening.left === null) return say("opening_elapsed", { s: Math.round(opening.elapsed + seconds) });
  return say("opening_left", { s: Math.max(1, Math.round(opening.left - seconds)) });
}
