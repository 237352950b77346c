// Which model answers, at which level: its title in the header opens the list of those on this computer.
import { TEXT, api, h, icon, on, say, state } from "/ui/floe.js";
import { elsewhere } from "/ui/conversation/elsewhere.js";
import { openModel, showModels } from "/ui/models/page.js";

export function switcher() {
  const name = h("span", { class: "name" }), level = h("span", { class: "level" });
  const items = h("div", { class: "menu-items" });
  const details = h("details", { class: "menu switcher" },
    h("summary", { id: "model-chip" }, name, level, icon("down")), items);

  function draw({ model, level: runs, server }) {
    name.textContent = elsewhere || model.title || "";
    level.textContent = elsewhere ? server : model.state === "ready" ? runs : "";
    details.firstChild.setAttribute("aria-label", elsewhere ? say("answered_elsewhere", { model: elsewhere, host: server })
      : say("model_chip", { name: model.title, level: runs }));
  }

  async function list() {
    const { models, levels, level: wished } = await api("GET", "/api/switcher");
    const choice = h("select", { id: "switcher-level", onchange: () => api("PATCH", "/api/switcher", { level: choice.value }) },
      ...levels.map((each) => h("option", { value: each }, each)));
    choice.value = wished;
    items.replaceChildren(...models.map((model) => entry(model.title, model.open, () => openModel(model.name))),
      levels.length > 1 && h("div", { class: "menu-row" }, h("label", { for: choice.id }, TEXT.level), choice) || "",
      entry(TEXT.all_models, false, showModels));
  }

  function entry(title, current, act) {
    return h("button", { type: "button", class: "entry", "aria-current": current ? "true" : null, disabled: current && state.model.state === "ready",
      onclick: () => { details.open = false; act(); } }, h("span", {}, title), current && h("span", { class: "tick" }, "✓"));
  }

  details.addEventListener("toggle", () => details.open && list());
  on("state", ({ now }) => draw(now));
  on("elsewhere", () => draw(state));
  return details;
}
