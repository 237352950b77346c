// Pages beside the conversation, named by the address: #settings. A page lies in the middle, below the header, in place
// of the conversation, which goes on. To add one: its name and script here; the script's mount(place) fills it once,
// place.dispatchEvent("shown") tells it each time that it is opened, and `page_NAME` (app/strings.py) is its title.
import { TEXT, button, h, on, opened } from "/ui/floe.js";

const PAGES = { models: "/ui/models/page.js", settings: "/ui/preferences/page.js" };

export const page = () => Object.keys(PAGES).find((name) => location.hash.split("/")[0] === `#${name}`) || null; // #models/get
export const go = (name) => { location.hash = name; }; // the browser's Back leads to the conversation again

export function pages() {
  const places = Object.keys(PAGES).map((name) => h("section", { class: "page", id: `page-${name}`, hidden: true,
    "aria-labelledby": `page-${name}-title` }, h("div", { class: "page-head" }, h("h2", { id: `page-${name}-title` },
    TEXT[`page_${name}`]), button("close", TEXT.close_page, () => { opened.id = opened.id; })), h("div", { class: "page-body" })));

  async function show() {
    const name = page();
    document.body.classList.toggle("on-page", Boolean(name));
    for (const place of places) place.hidden = place.id !== `page-${name}`;
    if (name) document.body.classList.remove("show-left", "show-right");
    const shown = places.find((place) => !place.hidden);
    if (!shown) return;
    const body = shown.lastChild;
    body.mounted ||= import(PAGES[name]).then((script) => script.mount(body));
    await body.mounted;
    body.dispatchEvent(new Event("shown"));
  }

  on("opened", show); // every change of the address ends there
  show();
  return places;
}
