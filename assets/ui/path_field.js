// A file or folder of this computer by its path; what was typed of it brings suggestions. -> [input, its suggestions]
import { api, h } from "/ui/floe.js";

export function pathField(kind, id, label) {
  const known = h("datalist", { id: `${id}-files` });
  const path = h("input", { id, list: known.id, "aria-label": label, placeholder: label, oninput: suggest, onfocus: suggest });
  async function suggest() {
    const typed = path.value;
    const found = await api("GET", `/api/models/files?${new URLSearchParams({ kind, path: typed })}`);
    if (typed === path.value) known.replaceChildren(...found.map((value) => h("option", { value })));
  }
  return [path, known];
}
