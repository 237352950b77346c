// The Models page: what is on this computer, what could be fetched and how it would run here, and work on models.
// Its three tabs are named by the address: #models, #models/get, #models/progress.
import { TEXT, api, bytes, duration, h, on, opened, say, state } from "/ui/floe.js";
import { go } from "/ui/pages.js";
import { diskTab } from "/ui/models/disk.js";
import { getTab } from "/ui/models/get.js";
import { progressTab, unfinished } from "/ui/models/progress.js";

const TABS = { disk: "models", get: "models/get", progress: "models/progress" };

export async function openModel(name, options = {}) {
  await api("POST", "/api/models/open", { name, ...options });
  opened.id = opened.id; // to the conversation, where its steps are shown
}

export async function measureLevels(name, text = "") {
  await api("POST", "/api/models/measure", { name, text });
}

export const unmeasured = (model) => model.kind === "compressed" && model.levels.length === 1;

// How many trials a level needs is not known before, so measuring says the most that it may take.
export const timeLeft = ({ kind, left }) =>
  (left ? say(kind === "measure" ? "time_left_most" : "time_left", { time: duration(left) }) : "");

export const showModels = () => go(TABS.disk);
export const showWorks = () => go(TABS.progress);

const wanted = () => Object.keys(TABS).find((name) => location.hash === `#${TABS[name]}`) || "disk";

export async function mount(root) {
  const machine = h("p", { class: "machine-line", id: "machine-line" });
  const looking = h("p", { class: "waits", role: "status" }, h("span", { class: "spinner" }), h("span", {}, TEXT.gpu_unknown));
  const page = { load, shelf: null };
  const panels = { disk: diskTab(page), get: getTab(page), progress: progressTab(page) };
  const counts = { disk: h("span", { class: "count" }), progress: h("span", { class: "count" }) };
  const tabs = Object.fromEntries(Object.keys(TABS).map((name) => [name, h("button", { type: "button", role: "tab",
    id: `tab-${name}`, "aria-controls": `models-${name}`, onclick: () => choose(name), onkeydown: (event) => step(event, name) },
  TEXT[`models_${name}`], counts[name])]));
  for (const [name, panel] of Object.entries(panels)) {
    for (const [key, value] of Object.entries({ role: "tabpanel", id: `models-${name}`, "aria-labelledby": `tab-${name}` }))
      panel.node.setAttribute(key, value);
  }
  root.replaceChildren(h("div", { class: "panel models-page" }, machine,
    h("div", { class: "tabs", role: "tablist", "aria-label": TEXT.page_models }, ...Object.values(tabs)),
    looking, ...Object.values(panels).map((panel) => panel.node)));

  function choose(name) {
    history.replaceState(null, "", `#${TABS[name]}`);
    draw();
    tabs[name].focus();
  }

  function step(event, name) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const names = Object.keys(TABS);
    choose(names[(names.indexOf(name) + by + names.length) % names.length]);
  }

  function draw() {
    for (const name of Object.keys(TABS)) {
      const here = name === wanted();
      tabs[name].setAttribute("aria-selected", here);
      tabs[name].tabIndex = here ? 0 : -1;
      panels[name].node.hidden = !here;
    }
  }

  async function load() {
    const shelf = page.shelf = await api("GET", "/api/models").finally(() => looking.remove()); // a disk may be slow
    machine.textContent = about(shelf);
    count();
    for (const panel of Object.values(panels)) panel.draw(shelf, state.works);
  }

  function count() {
    counts.disk.textContent = page.shelf.disk.filter((model) => model.kind !== "unfinished").length;
    counts.progress.textContent = unfinished(page.shelf, state.works) || "";
  }

  let watched = "";
  on("state", ({ now }) => {
    if (!page.shelf || !root.offsetParent) return;
    panels.progress.draw(page.shelf, now.works);
    const mark = `${now.model.state} ${now.model.name} ${now.works.map((work) => work.name + work.state)}`;
    if (mark !== watched) load();
    watched = mark;
  });
  root.addEventListener("shown", () => { draw(); load(); });
}

function about({ machine, notes, free_bytes: free }) {
  const parts = [machine.name];
  if (machine.device === "cuda") parts.push(say("machine_video", { free: bytes(machine.vram_free_bytes) }));
  parts.push(say("machine_memory", { free: bytes(machine.ram_free_bytes) }));
  if (free !== null) parts.push(say("machine_disk", { free: bytes(free) }));
  return [parts.join(" · "), ...notes].join(". ");
}
