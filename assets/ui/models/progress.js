// In progress: downloads, compressions, imports and measurements, running or waiting to be resumed.
import { TEXT, api, bytes, h, keep, notice, say } from "/ui/floe.js";
import { timeLeft } from "/ui/models/page.js";
import { quiet } from "/ui/models/card.js";

// An unfinished download of an earlier start that no work knows of.
const orphans = (shelf, works) => shelf.disk.filter((model) => model.kind === "unfinished"
  && !works.some((work) => work.name === model.name));
export const unfinished = (shelf, works) => works.length + orphans(shelf, works).length;

export function progressTab(page) {
  const list = h("ul", { class: "cards", id: "model-works" });
  const node = h("div", {}, list);

  function draw(shelf, works) {
    const pairs = [...works.map((item) => [`${item.name} ${item.state}`, item]),
      ...orphans(shelf, works).map((model) => [`left ${model.name}`, { ...model, left: true }])];
    keep(list, pairs.length ? pairs : [["nothing", null]], (item) => (item === null ? h("li", { class: "empty" }, TEXT.no_works)
      : item.kind === "unfinished" ? leftBehind(item) : work(item)), show);
  }

  function work(item) {
    const running = item.state === "running";
    return h("li", { class: "card", "data-name": item.name },
      h("div", { class: "card-head" }, h("h3", {}, item.title), h("span", { class: "verdict" },
        item.state === "paused" ? TEXT.paused : item.state === "failed" ? TEXT.work_failed : TEXT[`work_${item.kind}`])),
      h("span", { class: "meter-bar" }), h("p", { class: item.state === "failed" ? "note error" : "amount" }),
      h("div", { class: "model-buttons" }, quiet(TEXT.cancel, () => cancel(item)), running
        ? quiet(TEXT.pause, () => api("POST", "/api/models/pause", { name: item.name }))
        : quiet(TEXT.resume, () => api("POST", "/api/models/resume", { name: item.name }), "primary")));
  }

  function leftBehind(model) {
    return h("li", { class: "card", "data-name": model.name },
      h("div", { class: "card-head" }, h("h3", {}, model.title), h("span", { class: "verdict" }, TEXT.paused)),
      h("span", { class: "meter-bar" }), h("p", { class: "amount" }),
      h("div", { class: "model-buttons" }, quiet(TEXT.delete, () => remove(model), "quiet delete"),
        model.source && quiet(TEXT.resume, () => api("POST", "/api/models/download", { name: model.source, file: "", like: "" }), "primary")));
  }

  function show(item, shown) {
    if (!shown) return;
    const share = shown.kind === "unfinished" ? shown.share : shown.total ? shown.done / shown.total : 0;
    item.querySelector(".meter-bar").style.setProperty("--share", share);
    item.querySelector("p").textContent = shown.kind === "unfinished"
      ? say("unfinished", { percent: Math.round(100 * share) }) : line(shown);
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

  async function remove({ name, title, bytes: size }) {
    if (!confirm(say("really_delete", { name: title, size: bytes(size) }))) return;
    await api("POST", "/api/models/delete", { name });
    notice(say("freed", { name: title }));
    page.load();
  }

  async function cancel({ name, title, kind }) {
    if (!confirm(TEXT[`really_cancel_${kind}`].replace("{name}", title))) return;
    await api("POST", "/api/models/cancel", { name });
    notice(say(kind === "measure" ? "measuring_cancelled" : "cancelled", { name: title }));
    page.load();
  }
  return { node, draw };
}
