// Whether the program learns what to load while a question is being written, how much it has, and its end.
import { TEXT, api, bytes, h, notice } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";

export async function draw(place) {
  const now = await api("GET", "/api/preferences/habits");
  const box = h("input", { id: "habits-wanted", type: "checkbox", onchange: () =>
    api("PATCH", "/api/preferences/habits", { wanted: box.checked }).catch(() => draw(place)) });
  box.checked = now.wanted;
  const size = now.n_bytes ? bytes(now.n_bytes) : TEXT.habits_none;
  place.replaceChildren(line(TEXT.habits, box, TEXT.habits_info), line(TEXT.habits_learned, h("span", { class: "with-button", id: "habits-learned" },
    size, now.n_bytes > 0 && h("button", { type: "button", class: "quiet", id: "habits-forget", onclick: forget }, TEXT.delete))));

  async function forget() {
    await api("DELETE", "/api/preferences/habits");
    notice(TEXT.habits_forgotten);
    draw(place);
  }
}
