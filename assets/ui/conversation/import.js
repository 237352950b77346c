// Conversations from files: chosen or dropped, ours or another program's; how far a large one is.
import { TEXT, api, emit, h, notice, on, opened, say } from "/ui/floe.js";

const MOST_BYTES = 2 ** 31; // no shift: those have 32 bits

export function importing() {
  const files = h("input", { type: "file", accept: ".json,.jsonl,.md,.txt,.zip", multiple: true, hidden: true,
    "aria-label": TEXT.import, id: "import-file", onchange: () => { take([...files.files]); files.value = ""; } });
  const far = h("p", { class: "importing", role: "status", hidden: true });
  on("state", ({ now }) => {
    far.hidden = now.importing === null || now.importing === undefined;
    far.textContent = far.hidden ? "" : say("importing", { share: Math.floor(100 * now.importing) });
  });
  return { files, far };
}

export async function take(files) {
  const all = { made: [], grown: [], known: 0 };
  for (const file of files) {
    if (file.size > MOST_BYTES) {
      notice(TEXT.import_long);
      continue;
    }
    const taken = await api("POST", "/api/import", file).catch(() => null); // said already; the others go on
    if (!taken) continue;
    all.made.push(...taken.made);
    all.grown.push(...taken.grown);
    all.known += taken.known;
  }
  tell(all);
}

function tell({ made, grown, known }) {
  const said = [made.length && say("imported", { n: made.length }), grown.length && say("imported_grown", { n: grown.length }),
    known && say("imported_known", { n: known })].filter(Boolean);
  if (said.length) notice(said.join(" "));
  const newest = [...made, ...grown].reduce((best, each) => (best && best.updated_at >= each.updated_at ? best : each), null);
  if (newest) opened.id = newest.id;
  if (newest) emit("focus");
}
