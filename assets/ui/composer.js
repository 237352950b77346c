// The place to write: text, attached text files with their token count, Send and Stop.
import { TEXT, api, button, h, notice, on, opened, say } from "/ui/floe.js";

const MOST_BYTES = 1_000_000;
const draft = (id) => `floe-draft-text-${id || "new"}`;
const unsent = (id) => sessionStorage.getItem(draft(id)) || "";
const write = (id, text) => (text ? sessionStorage.setItem(draft(id), text) : sessionStorage.removeItem(draft(id)));

export function composer(send, meter) {
  const kept = new Map(); // attachments that have not been sent, by the conversation that they were attached in
  let whose = opened.id;
  const attached = (id = whose) => kept.get(id) || [];
  const area = h("textarea", { id: "message", rows: "1", placeholder: TEXT.placeholder, "aria-label": TEXT.message, dir: "auto",
    oninput: written, onkeydown: key });
  const files = h("div", { class: "files" });
  const picker = h("input", { type: "file", multiple: true, hidden: true, id: "attach-file", "aria-label": TEXT.attach,
    onchange: () => { attach(picker.files); picker.value = ""; } });

  function written() {
    write(whose, area.value);
    fit();
  }

  // What was not sent in a conversation waits there; a reload loses no word of it.
  function show() {
    whose = opened.id;
    area.value = unsent(whose);
    drawFiles();
    fit();
  }

  function fit() {
    area.style.height = "auto";
    if (area.scrollHeight) area.style.height = `${Math.min(area.scrollHeight, 240)}px`; // 0 where nothing is laid out yet
  }

  function key(event) {
    // keyCode 229: a browser that ends a composition before its Enter says so by nothing else
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      submit();
    }
  }

  async function submit() {
    const text = area.value, sent = attached(), from = whose;
    if (!text.trim() && !sent.length) return;
    put(from, "", []);
    try {
      await send(text, sent.map(({ name, text: content }) => ({ name, text: content })));
    } catch {
      put(from, [text, unsent(from)].filter(Boolean).join("\n"), [...sent, ...attached(from)]); // nothing written gets lost
    }
  }

  function put(id, text, list) {
    write(id, text);
    kept.set(id, list);
    if (id === whose) show();
  }

  async function attach(chosen) {
    const into = whose;
    for (const file of chosen) {
      if (file.size > MOST_BYTES) { notice(say("too_large", { name: file.name })); continue; }
      const text = await readText(file);
      if (text === null) { notice(say("not_text", { name: file.name })); continue; }
      const { tokens } = await api("POST", "/api/count", { text });
      kept.set(into, [...attached(into), { name: file.name, text, tokens }]);
    }
    drawFiles();
  }

  function drawFiles() {
    files.replaceChildren(...attached().map((file) => h("span", { class: "file" }, file.name,
      file.tokens !== null && h("small", {}, say("attached_tokens", { n: file.tokens })),
      button("close", `${TEXT.remove} ${file.name}`, () => {
        kept.set(whose, attached().filter((other) => other !== file));
        drawFiles();
      }))));
  }

  on("focus", () => area.focus());
  on("opened", show);
  on("begun", (id) => { // what is being written already is meant for the conversation that has begun
    put(id, unsent(null), attached(null));
    put(null, "", []);
  });
  on("draft", (text) => { area.value = [area.value, text].filter(Boolean).join("\n"); written(); area.focus(); });
  show();
  return h("div", { class: "composer" }, files,
    h("div", { class: "box", ondragover: (event) => event.preventDefault(),
      ondrop: (event) => { event.preventDefault(); attach(event.dataTransfer.files); } },
      picker, button("clip", TEXT.attach, () => picker.click()), area,
      button("stop", TEXT.stop, () => api("POST", "/api/stop"), { id: "stop", class: "icon-button round stop" }),
      button("send", TEXT.send, submit, { id: "send", class: "icon-button round send" })),
    h("div", { class: "under" }, meter, h("span", { class: "hint" }, TEXT.shortcuts)));
}

async function readText(file) {
  const bytes = await file.arrayBuffer();
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}
