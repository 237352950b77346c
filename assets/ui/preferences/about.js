// Version and licences.
import { TEXT, api, h } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";

export async function draw(place) {
  const { version, python, system, libraries } = await api("GET", "/api/preferences/about");
  const value = (text) => h("span", {}, text);
  place.replaceChildren(line(TEXT.version_of, value(version)), line(TEXT.python_of, value(python)), line(TEXT.system_of, value(system)),
    line(TEXT.licence_of, value(TEXT.licence_own)),
    h("details", { id: "licences" }, h("summary", {}, TEXT.licences), h("table", {}, h("tbody", {}, ...libraries.map((each) =>
      h("tr", {}, h("th", { scope: "row" }, each.name), h("td", {}, each.version), h("td", {}, each.licence)))))));
}
