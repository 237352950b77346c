// The models page: what is on the disk, what could be fetched and how it would run on this machine, and work on models.
import { TEXT, api, bytes, duration, emit, h, keep, notice, on, rate, ready, say, start } from "/ui/floe.js";
import { choose } from "/ui/choose.js";
import { pathField } from "/ui/path_field.js";

const AIMS = ["all", "fast", "best", "coding", "long"];

export async function openModel(name, level, context) {
  await api("POST", "/api/models/open", { name, level, context });
}

export async function measureLevels(name, text = "") {
  await api("POST", "/api/models/measure", { name, text });
}

export const unmeasured = (model) => model.kind === "compressed" && model.levels.length === 1;

// How many trials a level needs is not known before, so measuring says the most that it may take.
export const timeLeft = ({ kind, left }) =>
  (left ? say(kind === "measure" ? "time_left_most" : "time_left", { time: duration(left) }) : "");

export function showModels() {
  document.body.classList.remove("hide-right");
  if (matchMedia("(max-width: 1100px)").matches) document.body.classList.add("show-right");
  for (const tab of document.querySelectorAll("#right button[role=tab]"))
    if (tab.textContent.trim() === TEXT.tab_models) tab.click();
}

export async function mount(root) {
  await ready;
  let shelf = null, aim = "all", watched = "";
  const disk = h("ul", { class: "models", id: "disk" });
  const use = h("p", { class: "device-line", id: "disk-use" });
  const works = h("ul", { class: "models", id: "model-works" });
  const offers = h("ul", { class: "models", id: "offers" });
  const notes = h("div", { class: "device-line" });
  const choice = h("select", { "aria-label": TEXT.aim, onchange: () => { aim = choice.value; drawOffers(); } },
    ...AIMS.map((name) => h("option", { value: name }, TEXT[`aim_${name}`])));
  const other = h("input", { placeholder: TEXT.fetch_placeholder, "aria-label": TEXT.fetch_other, id: "hub-id" });
  root.replaceChildren(h("section", { class: "panel", "aria-label": TEXT.tab_models },
    h("h2", {}, TEXT.on_disk), disk, use, keeping(load), works,
    h("div", { class: "panel-head" }, h("h2", {}, TEXT.offers),
      h("button", { type: "button", class: "quiet", id: "find-model", onclick: () => emit("welcome") }, TEXT.find_model)),
    choice, notes, offers,
    h("h2", {}, TEXT.fetch_other), h("div", { class: "hub-id" }, other,
      h("button", { type: "button", class: "primary", onclick: () => fetchModel(other.value) }, TEXT.fetch)),
    ...importing()));

  async function load() {
    shelf = await api("GET", "/api/models");
    notes.textContent = shelf.notes.join(" ");
    use.textContent = say(shelf.free_bytes === null ? "disk_gone" : "disk_use",
      { used: bytes(shelf.used_bytes), free: bytes(shelf.free_bytes), folder: shelf.folder });
    keep(disk, shelf.disk.map((model) => [JSON.stringify({ ...model, read_by: "" }), model]), onDisk, (node, model) => {
      for (const button of node.querySelectorAll(".delete")) button.disabled = Boolean(model.read_by); // something is made of it
    });
    drawOffers();
  }

  function drawOffers() {
    if (!shelf) return;
    const shown = shelf.offers.filter((offer) => aim === "all" || offer.good_for.includes(aim));
    keep(offers, (aim === "all" ? shown : shown.slice(0, 3)).map((offer) => [JSON.stringify(offer), offer]), offered);
  }

  const quiet = (text, onclick, name = "quiet") => h("button", { type: "button", class: name, onclick }, text);

  function onDisk(model) {
    const whole = model.kind !== "unfinished";
    return h("li", { "data-name": model.name }, h("div", { class: "model-head" },
      h("strong", {}, model.kind === "demo" ? TEXT.demo_title : model.name),
      model.open && h("span", { class: "verdict fits" }, TEXT.is_open), h("span", { class: "amount" }, bytes(model.bytes))),
      whole && choose(model, open), unmeasured(model) && measuring(model),
      !whole && h("p", { class: "amount" }, say("unfinished", { percent: Math.round(100 * model.share) })),
      h("div", { class: "model-buttons" },
        quiet(TEXT.open_folder, () => api("POST", "/api/models/folder", { name: model.name })),
        !whole && model.source && quiet(TEXT.resume, () => fetchModel(model.source)),
        model.kind === "checkpoint" && quiet(TEXT.compress, () => api("POST", "/api/models/compress", { name: model.name })),
        !model.open && whole && quiet(TEXT.open, () => open(model.name)),
        !model.open && model.kind !== "demo" && quiet(TEXT.delete, () => remove(model), "quiet delete")));
  }

  function offered(offer) {
    return h("li", { "data-name": offer.name }, h("div", { class: "model-head" }, h("strong", {}, offer.title),
      h("span", { class: `verdict ${offer.verdict}` }, TEXT[`verdict_${offer.verdict}`])),
      h("p", {}, offer.about),
      h("p", { class: "amount" }, [offer.verdict !== "no" && say("expected", { n: rate(offer.tokens_per_second) }),
        bytes(offer.download_bytes), offer.licence].filter(Boolean).join(" · ")),
      choose(offer),
      h("div", { class: "model-buttons" }, quiet(TEXT.fetch, () => fetchModel(offer.name))));
  }

  function drawWorks(list) {
    keep(works, list.map((item) => [`${item.name} ${item.state}`, item]), work, (node, item) => {
      node.querySelector(".meter-bar").style.setProperty("--share", item.total ? item.done / item.total : 0);
      node.querySelector("p").textContent = line(item);
    });
  }

  function work(item) {
    return h("li", { "data-name": item.name },
      h("div", { class: "model-head" }, h("strong", {}, item.name), h("span", { class: "amount" },
        item.state === "paused" ? TEXT.paused : TEXT[`work_${item.kind}`])),
      h("span", { class: "meter-bar" }), h("p", { class: item.state === "failed" ? "note error" : "amount" }),
      h("div", { class: "model-buttons" }, item.state === "running"
        ? quiet(TEXT.pause, () => api("POST", "/api/models/pause", { name: item.name }))
        : quiet(TEXT.resume, () => api("POST", "/api/models/resume", { name: item.name })),
        quiet(TEXT.cancel, () => cancel(item))));
  }

  function line(item) {
    if (item.state === "failed") return item.text;
    if (item.state === "paused" && !item.total) return item.text;
    if (item.state === "paused" && item.kind === "measure") return TEXT.measure_stopped;
    const left = timeLeft(item);
    if (item.kind !== "download") return say("work_line", { text: item.text, left });
    return [say("download_line", { done: bytes(item.done), total: bytes(item.total), speed: bytes(item.speed), left }),
      item.text].filter(Boolean).join(" · ");
  }

  async function open(name, level, context) {
    await openModel(name, level, context);
    for (const details of disk.querySelectorAll("details[open]")) details.open = false;
    load();
  }

  async function fetchModel(name) {
    if (name.trim()) await api("POST", "/api/models/download", { name });
  }

  async function remove({ name, bytes: size }) {
    if (!confirm(say("really_delete", { name, size: bytes(size) }))) return;
    await api("POST", "/api/models/delete", { name });
    notice(say("freed", { name }));
    load();
  }

  async function cancel({ name, kind }) {
    const measure = kind === "measure";
    if (!confirm(TEXT[`really_cancel_${kind}`].replace("{name}", name))) return;
    await api("POST", "/api/models/cancel", { name });
    notice(say(measure ? "measuring_cancelled" : "cancelled", { name }));
    load();
  }

  on("state", ({ now }) => {
    drawWorks(now.works);
    const mark = `${now.model.state} ${now.model.name} ${now.works.map((work) => work.name + work.state)}`;
    if (mark !== watched && root.offsetParent) load();
    watched = mark;
  });
  new IntersectionObserver((entries) => { if (entries.some((e) => e.isIntersecting)) load(); }).observe(root);
  start();
}

// A model that offers level exact only, and what is to be done about it.
function measuring({ name }) {
  const [text, known] = pathField("text", `text-of-${name}`, TEXT.measure_text);
  return h("details", { class: "choose" }, h("summary", {}, TEXT.measure), h("p", {}, TEXT.measure_about), text, known,
    h("div", { class: "model-buttons" }, h("button", { type: "button", class: "primary", onclick: () =>
      measureLevels(name, text.value) }, TEXT.measure)));
}

// Where new models are kept; they may be larger than the disk with the home folder.
function keeping(then) {
  const [path, known] = pathField("folder", "models-folder", TEXT.keep_models_path);
  const details = h("details", { class: "choose" }, h("summary", {}, TEXT.keep_models), h("p", {}, TEXT.keep_models_about),
    path, known, h("div", { class: "model-buttons" }, h("button", { type: "button", class: "primary", onclick: async () => {
      const { folder } = await api("POST", "/api/models/keep", { folder: path.value });
      details.open = false;
      notice(say("models_kept", { folder }));
      then();
    } }, TEXT.keep_models_now)));
  return details;
}

function importing() {
  const [path, known] = pathField("gguf", "gguf-path", TEXT.gguf_path);
  const like = h("input", { id: "gguf-like", "aria-label": TEXT.gguf_like, placeholder: TEXT.gguf_like_short });
  return [h("h2", {}, TEXT.gguf), path, known, h("div", { class: "hub-id" }, like,
    h("button", { type: "button", class: "primary", id: "gguf-import", onclick: () =>
      api("POST", "/api/models/import", { file: path.value, like: like.value }) }, TEXT.gguf_import))];
}
