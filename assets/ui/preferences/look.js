// Light or dark. It belongs to this browser, so the program is not asked.
import { TEXT, h } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";
import { setTheme, theme } from "/ui/theme.js";

export function draw(place) {
  const choice = h("select", { id: "preference-theme", onchange: () => setTheme(choice.value) },
    ...["system", "light", "dark"].map((name) => h("option", { value: name }, TEXT[`theme_${name}`])));
  choice.value = theme();
  place.replaceChildren(line(TEXT.theme_choice, choice));
}
