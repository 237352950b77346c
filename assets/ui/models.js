// The models page: what is on the disk, what could be fetched and how it would run on this machine, and downloads.
import { TEXT, api, h, notice, on, ready, say, start } from "/ui/floe.js";
import { bytes } from "/ui/panel.js";

const AIMS = ["all", "fast", "best", "coding", "long"];

export async function mount(root) {
  await ready;
  let shelf = null, aim = "all", watched = "";
  const disk = h("ul", { class: "models" });
  const downloads = h("ul", { class: "models", id: "downloads" });
  const offers = h("ul", { class: "models", id: "offers" });
  const notes = h("div", { class: "device-line" });
  const choice = h("select", { "aria-label": TEXT.aim, onchange: () => { aim = choice.value; draw(); } },
    ...AIMS.map((name) => h("option", { value: name }, TEXT[`aim_${name}`])));
  const other = h("input", { placeholder: TEXT.fetch_placeholder, "aria-label": TEXT.fetch_other, id: "hub-id" });
  root.replaceChildren(h("section", { class: "panel", "aria-label": TEXT.tab_models },
    h("h2", {}, TEXT.on_disk), disk, downloads, h("h2", {}, TEXT.offers), choice, notes, offers,
    h("h2", {}, TEXT.fetch_other), h("div", { class: "hub-id" }, other,
      h("button", { type: "button", class: "primary", onclick: () => fetchModel(other.value) }, TEXT.fetch))));

  async function load() {
    shelf = await api("GET", "/api/models");
    draw();
  }

  function draw() {
    if (!shelf) return;
    disk.replaceChildren(...shelf.disk.map(onDisk));
    notes.textContent = shelf.notes.join(" ");
    const shown = shelf.offers.filter((offer) => aim === "all" || offer.good_for.includes(aim));
    offers.replaceChildren(...(aim === "all" ? shown : shown.slice(0, 3)).map(offered));
  }

  function onDisk(model) {
    const state = model.open ? TEXT.is_open : model.kind === "unfinished"
      ? say("unfinished", { percent: Math.round(100 * model.share) }) : "";
    return h("li", { "data-name": model.name }, h("div", { class: "model-head" },
      h("strong", {}, model.kind === "demo" ? TEXT.demo_title : model.name), h("span", { class: "amount" }, bytes(model.bytes))),
      h("div", { class: "model-buttons" }, h("span", { class: "amount" }, state),
        !model.open && model.kind !== "unfinished" &&
          h("button", { type: "button", class: "quiet", onclick: () => openModel(model.name) }, TEXT.open),
        !model.open && model.kind !== "demo" &&
          h("button", { type: "button", class: "quiet", onclick: () => remove(model.name) }, TEXT.delete)));
  }

  function offered(offer) {
    return h("li", { "data-name": offer.name }, h("div", { class: "model-head" }, h("strong", {}, offer.title),
      h("span", { class: `verdict ${offer.verdict}` }, TEXT[`verdict_${offer.verdict}`])),
      h("p", {}, offer.about),
      h("p", { class: "amount" }, [offer.verdict !== "no" && say("expected", { n: rate(offer.tokens_per_second) }),
        bytes(offer.download_bytes), offer.licence].filter(Boolean).join(" · ")),
      h("details", {}, h("summary", {}, TEXT.details), h("pre", { tabindex: "0" }, offer.text)),
      h("div", { class: "model-buttons" },
        h("button", { type: "button", class: "quiet", onclick: () => fetchModel(offer.name) }, TEXT.fetch)));
  }

  function drawDownloads(list) {
    downloads.replaceChildren(...list.map((item) => h("li", { "data-name": item.name },
      h("div", { class: "model-head" }, h("strong", {}, item.name),
        h("span", { class: "amount" }, item.state === "paused" ? TEXT.paused : "")),
      h("span", { class: "meter-bar", style: `--share:${item.total ? item.done / item.total : 0}` }),
      h("p", { class: item.state === "failed" ? "note error" : "amount" }, item.state === "failed" ? item.text
        : say("download_line", { done: bytes(item.done), total: bytes(item.total), speed: bytes(item.speed),
          left: item.left ? say("download_left", { time: duration(item.left) }) : "" })),
      h("div", { class: "model-buttons" }, item.state === "running"
        ? h("button", { type: "button", class: "quiet", onclick: () => api("POST", "/api/models/pause", { name: item.name }) }, TEXT.pause)
        : h("button", { type: "button", class: "quiet", onclick: () => fetchModel(item.name) }, TEXT.resume)))));
  }

  async function openModel(name) {
    await api("POST", "/api/models/open", { name });
    load();
  }

  async function fetchModel(name) {
    if (name.trim()) await api("POST", "/api/models/download", { name });
  }

  async function remove(name) {
    if (!confirm(say("really_delete", { name }))) return;
    await api("POST", "/api/models/delete", { name });
    notice(say("freed", { name }));
    load();
  }

  on("state", ({ now }) => {
    drawDownloads(now.downloads);
    const mark = `${now.model.state} ${now.model.name} ${now.downloads.map((d) => d.name + d.state)}`;
    if (mark !== watched && root.offsetParent) load();
    watched = mark;
  });
  new IntersectionObserver((entries) => { if (entries.some((e) => e.isIntersecting)) load(); }).observe(root);
  start();
}

const rate = (n) => (n >= 10 ? n.toFixed(0) : n.toFixed(1));
const duration = (s) => (s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);
