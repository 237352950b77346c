// Get models: the catalogue with how each would run here, the Hub by words or by an address, and what already lies on
// this computer: a folder or a GGUF file, dropped or given by its path.
import { TEXT, api, bytes, emit, h, keep, notice, patiently, say } from "/ui/floe.js";
import { droppable } from "/ui/drop.js";
import { showModels, showWorks } from "/ui/models/page.js";
import { card, judge, practical, quiet, setFacts, toFetch } from "/ui/models/card.js";
import { planDetails } from "/ui/models/plan.js";
import { pathField } from "/ui/path_field.js";

const AIMS = ["all", "fast", "best", "coding", "long"];

export function getTab(page) {
  let shelf = null, aim = "all";
  const offers = h("ul", { class: "cards", id: "offers" });
  const found = h("ul", { class: "cards", id: "hub-found" });
  const headline = h("p", { class: "offers-said", id: "offers-said", hidden: true });
  const choice = h("select", { "aria-label": TEXT.aim, onchange: () => { aim = choice.value; drawOffers(); } },
    ...AIMS.map((name) => h("option", { value: name }, TEXT[`aim_${name}`])));
  const search = h("input", { type: "search", id: "hub-id", maxlength: 400, placeholder: TEXT.hub_search, "aria-label": TEXT.hub_search,
    oninput: () => { if (!search.value.trim()) found.replaceChildren(); drawOffers(); },
    onkeydown: (event) => { if (event.key === "Enter") look(); } });
  const opener = h("button", { type: "button", class: "quiet", "aria-expanded": "false", "aria-controls": "add-local",
    onclick: () => local.show(local.hidden) }, TEXT.add_local);
  const local = adding(opener);
  const node = h("div", { class: "get-models" }, h("h3", {}, TEXT.hub_add),
    h("div", { class: "find" }, search, quiet(TEXT.hub_look, look, "primary"),
      opener), local,
    found,
    h("div", { class: "offers-head" }, h("h3", {}, TEXT.offers), choice,
      h("button", { type: "button", class: "quiet", id: "find-model", onclick: () => emit("welcome") }, TEXT.find_model)),
    headline, offers);
  droppable(node, ["Files", "text/uri-list"], (dropped) => locate(dropped, local));

  function draw(now) {
    shelf = now;
    drawOffers();
  }

  // Words in the search narrow the catalogue at once; the Hub is asked when the person says so.
  const meant = (offer) => search.value.toLowerCase().split(/\s+/).every((word) =>
    `${offer.title} ${offer.name} ${offer.about} ${offer.repository}`.toLowerCase().includes(word));

  function drawOffers() {
    if (!shelf) return;
    const shown = shelf.offers.filter((offer) => (aim === "all" || offer.good_for.includes(aim)) && meant(offer));
    headline.hidden = shown.length > 0 && shelf.offers.some(practical);
    headline.textContent = shown.length ? TEXT.nothing_practical : TEXT.offers_none;
    const there = (name) => (shelf.disk.some((model) => model.name === name && model.kind !== "unfinished") ? "here"
      : shelf.works.some((work) => work.name === name) ? "working" : "");
    keep(offers, (aim === "all" ? shown : shown.slice(0, 3)).map((offer) =>
      [JSON.stringify([offer.name, offer.verdict, there(offer.name)]), offer]), (offer) => offered(offer, there(offer.name)),
    (item, offer) => { // free memory and the connection change; what a person has opened stays open
      judge(item, offer);
      setFacts(item, factsOf(offer));
    });
  }

  const factsOf = (model) => [model.download_bytes > 0 && toFetch(model.download_bytes, shelf?.fetch_rate),
    model.disk_bytes > 0 && say("on_disk_size", { size: bytes(model.disk_bytes) }), model.licence];

  function offered(offer, there) {
    const fetch = () => fetchModel(offer.name);
    return card(offer, {
      about: offer.verdict === "no" ? offer.missing : offer.about,
      buttons: there === "here" ? [quiet(TEXT.models_disk, showModels)] : there ? [quiet(TEXT.models_progress, showWorks)]
        : offer.verdict === "no" ? [] : [quiet(TEXT.fetch, fetch, practical(offer) ? "primary" : "quiet")],
      below: [planDetails(offer)],
    });
  }

  async function look() {
    const words = search.value.trim();
    if (!words) return;
    const waiting = h("li", { class: "empty" });
    found.replaceChildren(waiting);
    const answer = await patiently(waiting, TEXT.hub_looking, (signal) =>
      api("GET", `/api/models/search?${new URLSearchParams({ q: words })}`, undefined, signal)).finally(() => waiting.remove());
    if (search.value.trim() !== words) return;
    found.replaceChildren(...(answer.repository ? [repository(answer.repository)] : answer.hits.map(hit)));
    if (!found.children.length) found.replaceChildren(h("li", { class: "empty" }, TEXT.hub_none));
  }

  function hit({ repository: name, downloads, likes, formats }) {
    const item = card({ name }, {
      facts: [formats.join(", "), say("hub_downloads", { n: downloads.toLocaleString("en") }), say("hub_likes", { n: likes.toLocaleString("en") })],
      buttons: [quiet(TEXT.hub_examine, async () => item.replaceWith(repository(await patiently(item.querySelector(".model-buttons"),
        TEXT.hub_looking, (signal) => api("GET", `/api/models/examine?${new URLSearchParams({ name })}`, undefined, signal)))))],
    });
    return item;
  }

  function repository(model) {
    const files = model.files.map((file) => h("option", { value: file.name, selected: matches(file.name, model.file) },
      say("hub_file", { name: file.name, size: bytes(file.bytes) })));
    const original = model.download_bytes > 0 && h("option", { value: "" }, say("hub_original", { size: bytes(model.download_bytes) }));
    const file = files.length > 0 && h("select", { "aria-label": TEXT.hub_which, onchange: () => { likeField.hidden = !file.value; } },
      original, ...files);
    const [likeField, like] = originalField(!file.value);
    return card(model, {
      about: model.missing,
      facts: factsOf(model),
      buttons: [file, model.verdict !== "no" && quiet(TEXT.fetch, () => fetchModel(model.name, file.value, like.value),
        practical(model) ? "primary" : "quiet")].filter(Boolean),
      below: [likeField, model.verdict !== "unknown" && planDetails(model)].filter(Boolean),
    });
  }

  async function fetchModel(name, file = "", like = "") {
    await api("POST", "/api/models/download", { name, file, like: file && like });
    notice(say("fetch_begun", { name: name.split("/").pop() }));
    page.load();
  }
  return { node, draw };
}

// "Q4_K_M" or "folder/file.gguf", as an address names the file.
const matches = (name, wanted) => Boolean(wanted) && (name === wanted.replace(/(-\d{5}-of-\d{5})?\.gguf$/, "")
  || name.toLowerCase().endsWith(wanted.toLowerCase()));

// Where the configuration of a GGUF file is, when neither it nor its repository says so.
function originalField(hidden) {
  const like = h("input", { placeholder: TEXT.gguf_like });
  return [h("label", { hidden, class: "original" }, h("span", {}, TEXT.gguf_like_short), like), like];
}

function adding(opener) {
  const [path, known] = pathField("gguf", "local-path", TEXT.local_path);
  const [likeField, like] = originalField(true);
  like.id = "gguf-like";
  path.addEventListener("input", () => { likeField.hidden = !path.value.trim().endsWith(".gguf"); });
  const box = h("div", { class: "storage", id: "add-local", hidden: true }, h("p", {}, TEXT.add_local_about),
    path, known, likeField, h("div", { class: "model-buttons" }, quiet(TEXT.add, add, "primary")));
  box.path = path;
  box.show = (open) => {
    box.hidden = !open;
    opener.setAttribute("aria-expanded", open);
    if (open) path.focus();
  };

  async function add() {
    const { name, kind } = await api("POST", "/api/models/add", { path: path.value, like: like.value });
    path.value = like.value = "";
    likeField.hidden = true;
    box.show(false);
    if (kind === "gguf") return showWorks();
    notice(say("added", { name }));
    showModels();
  }
  return box;
}

// A browser tells the name and size of what is dropped, and not where it lies: the program looks in the usual places.
async function locate(dropped, local) {
  const [file] = dropped.files, address = dropped.getData("text/uri-list").trim();
  local.show(true);
  const folder = Boolean(dropped.items[0]?.webkitGetAsEntry?.()?.isDirectory);
  const path = address.startsWith("file://") ? decodeURIComponent(new URL(address).pathname)
    : file && (await api("POST", "/api/models/where", { name: file.name, bytes: folder ? 0 : file.size })).path;
  local.path.value = path || file?.name || "";
  local.path.dispatchEvent(new Event("input"));
  local.path.focus();
  if (!path) notice(say("drop_unknown", { name: file?.name || "" }));
}
