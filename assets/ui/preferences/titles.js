// Whether the model writes titles.
import { TEXT, api, h } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";

export async function draw(place) {
  const { by_model: now } = await api("GET", "/api/preferences/titles");
  const box = h("input", { id: "model-titles", type: "checkbox", onchange: () =>
    api("PATCH", "/api/preferences/titles", { by_model: box.checked }).catch(() => draw(place)) });
  box.checked = now;
  place.replaceChildren(line(TEXT.model_titles, box, TEXT.model_titles_info));
}
