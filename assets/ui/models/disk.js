// On this computer: the models that can be loaded, what each needs, and where new ones are stored.
import { TEXT, api, bytes, h, keep, notice, say, state } from "/ui/floe.js";
import { measureLevels, openModel, unmeasured } from "/ui/models/page.js";
import { card, judge, quiet } from "/ui/models/card.js";
import { planDetails } from "/ui/models/plan.js";
import { pathField } from "/ui/path_field.js";

export function diskTab(page) {
  const list = h("ul", { class: "cards", id: "disk" });
  const use = h("p", { class: "device-line", id: "disk-use" });
  const node = h("div", {}, list, use, storage(page));
  const plans = new Map(); // of what was judged already, by what it depends on

  function draw(shelf) {
    use.textContent = say(shelf.free_bytes === null ? "disk_gone" : "disk_use",
      { used: bytes(shelf.used_bytes), free: bytes(shelf.free_bytes), folder: shelf.folder });
    const whole = shelf.disk.filter((model) => model.kind !== "unfinished");
    keep(list, whole.map((model) => [JSON.stringify({ ...model, read_by: "" }), model]), row, (item, model) => {
      for (const button of item.querySelectorAll(".delete")) button.disabled = Boolean(model.read_by); // something is made of it
      const badge = item.querySelector(".verdict.open");
      if (badge) badge.textContent = state.model.state === "ready" ? TEXT.is_open : TEXT.is_loading;
    });
    judgeAll();
  }

  // One after the other: a plan of a model that nobody has looked at yet takes seconds.
  let judging = false;
  async function judgeAll() {
    if (judging) return;
    judging = true;
    for (let item; (item = [...list.children].find((each) => !each.judged));) { // a row that was drawn meanwhile, too
      if (!plans.has(item.key)) plans.set(item.key, await api("GET", `/api/models/plan?${
        new URLSearchParams({ name: item.dataset.name })}`).catch(() => ({})));
      judge(item, plans.get(item.key));
      item.judged = true;
    }
    judging = false;
  }

  function row(model) {
    const { title } = model;
    return card({ name: model.name, title }, {
      about: model.kind === "checkpoint" ? TEXT.checkpoint_about : model.kind === "demo" ? TEXT.demo_about : null,
      badges: [model.open && h("span", { class: "verdict open" })].filter(Boolean),
      facts: [say("on_disk_size", { size: bytes(model.bytes) }), model.linked && TEXT.is_linked, model.source,
        model.levels.length > 1 && say("levels_are", { levels: model.levels.join(", ") })],
      buttons: [
        model.kind === "checkpoint" && quiet(TEXT.compress, () => compress(model)),
        quiet(TEXT.open_folder, () => api("POST", "/api/models/folder", { name: model.name })),
        !model.open && model.kind !== "demo" && quiet(model.linked ? TEXT.unlink : TEXT.delete, () => remove(model), "quiet delete"),
        !model.open && quiet(TEXT.open, () => openModel(model.name), "primary"),
      ].filter(Boolean),
      below: [unmeasured(model) && measuring(model), model.kind === "checkpoint" && compressing(model), planDetails({ name: model.name, title }, (options) =>
        openModel(model.name, options))].filter(Boolean),
    });
  }

  async function remove({ name, title, bytes: size, linked }) {
    if (!confirm(say(linked ? "really_unlink" : "really_delete", { name: title, size: bytes(size) }))) return;
    await api("POST", "/api/models/delete", { name });
    notice(say(linked ? "unlinked" : "freed", { name: title }));
    page.load();
  }
  return { node, draw };
}

// A model that offers level exact only, and what is to be done about it.
const measuring = ({ name }) => withText(`text-of-${name}`, TEXT.measure, TEXT.measure_about, TEXT.measure_text,
  (text) => measureLevels(name, text));

// A checkpoint whose codes are to err less on a text.
const compressing = (model) => withText(`text-for-${model.name}`, TEXT.compress_with, TEXT.compress_with_about,
  TEXT.compress_text, (text) => compress(model, { text }));

const compress = ({ name }, over = {}) => api("POST", "/api/models/compress", { name, ...over });

// Work that may read a file, folded: what it is, the file's path, and the button that begins it.
function withText(id, title, about, label, begin) {
  const [path, known] = pathField("text", id, label);
  return h("details", { class: "card-details" }, h("summary", {}, title), h("p", {}, about), path, known,
    h("div", { class: "model-buttons" }, quiet(title, () => begin(path.value), "primary")));
}

// Where new models are kept; they may be larger than the disk with the home folder.
function storage(page) {
  const [path, known] = pathField("folder", "models-folder", TEXT.keep_models_path);
  const details = h("details", { class: "storage" }, h("summary", {}, TEXT.keep_models), h("p", {}, TEXT.keep_models_about),
    path, known, h("div", { class: "model-buttons" }, quiet(TEXT.keep_models_now, async () => {
      const { folder } = await api("POST", "/api/models/keep", { folder: path.value });
      details.open = false;
      notice(say("models_kept", { folder }));
      page.load();
    }, "primary")));
  return details;
}
