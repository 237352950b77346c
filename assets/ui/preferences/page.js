// The settings page: what is set of the whole program. A section is a script in assets/ui/preferences/ that exports
// draw(place), which fills an empty place each time that the page is opened (it may be asynchronous; what it stores, it
// stores by itself), and the module of the same name in app/preferences/, where the way to add one is written down.
import { TEXT, h } from "/ui/floe.js";

const SECTIONS = ["folders", "downloads", "look", "titles", "habits", "programs", "network", "server", "diagnostics", "about"];

export async function mount(root) {
  const scripts = await Promise.all(SECTIONS.map((name) => import(`/ui/preferences/${name}.js`)));
  const places = SECTIONS.map(() => h("div", { class: "preference-parts" }));
  root.replaceChildren(h("div", { class: "panel preferences" }, ...SECTIONS.map((name, i) =>
    h("section", { class: "preference", id: `preferences-${name}`, "aria-labelledby": `preferences-${name}-title` },
      h("h3", { id: `preferences-${name}-title` }, TEXT[`preferences_${name}`]), places[i]))));
  root.addEventListener("shown", () => scripts.forEach(({ draw }, i) => {
    places[i].replaceChildren();
    draw(places[i]);
  }));
}

// One line of a section: what it is, a control or a value, and a line of help. The label names the control.
export function line(label, control, help) {
  if (help) control.setAttribute("aria-describedby", `${control.id}-help`);
  const named = ["INPUT", "SELECT", "TEXTAREA"].includes(control.tagName);
  return h("div", { class: "line" }, h(named ? "label" : "span", { class: "line-name", for: named ? control.id : null }, label),
    control, help && h("small", { id: `${control.id}-help` }, help));
}
