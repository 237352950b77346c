// What an attached file holds, above the page.
import { TEXT, button, h } from "/ui/floe.js";

export function preview(file) {
  const place = h("dialog", { class: "preview", "aria-label": file.name, onclose: () => place.remove(),
    onclick: (event) => event.target === place && place.close() },
  h("div", { class: "preview-head" }, h("strong", {}, file.name), button("close", TEXT.dismiss, () => place.close())),
  h("pre", { tabindex: "0", dir: "auto" }, file.text));
  document.querySelector(".floe-chat").append(place);
  place.showModal();
}
