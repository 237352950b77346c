// A zip of facts for somebody who helps.
import { TEXT, download, h, state } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";

export function draw(place) {
  const whose = h("select", { id: "diagnostics-messages" }, h("option", { value: "" }, TEXT.diagnostics_no_messages),
    ...state.conversations.map(({ id, title }) => h("option", { value: id }, title || TEXT.untitled)));
  const make = () => download(`/api/preferences/diagnostics/zip${whose.value && `?conversation=${whose.value}`}`);
  place.replaceChildren(h("p", {}, TEXT.diagnostics_about), line(TEXT.diagnostics_messages, whose, TEXT.diagnostics_messages_help),
    h("div", { class: "model-buttons" }, h("button", { type: "button", class: "quiet", id: "diagnostics-make", onclick: make },
      TEXT.diagnostics_make)));
}
