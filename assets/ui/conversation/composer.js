// The place to write: text, attached text files with their token count, Send and Stop.
import { TEXT, api, button, h, notice, on, opened, say } from "/ui/floe.js";
import { elsewhere } from "/ui/conversation/elsewhere.js";
import { preview } from "/ui/conversation/preview.js";

const MOST_BYTES = { pdf: 11_000_000, text: 1_000_000 }; // what a request can carry
const LONG_PASTE = 4000; // characters
const COUNT_MS = 400; // after the last key
const draft = (id) => `floe-draft-text-${id || "new"}`;
const unsent = (id) => sessionStorage.getItem(draft(id)) || "";
const write = (id, text) => (text ? sessionStorage.setItem(draft(id), text) : sessionStorage.removeItem(draft(id)));

export function composer(send, meter) {
  const kept = new Map(); // attachments that have not been sent, by the conversation that they were attached in
  let whose = opened.id;
  const attached = (id = whose) => kept.get(id) || [];
  const area = h("textarea", { id: "message", rows: "1", placeholder: TEXT.placeholder, "aria-label": TEXT.message, dir: "auto",
    oninput: written, onkeydown: key, onpaste: pasted });
  const counted = h("span", { class: "counted", id: "draft-tokens" });
  const files = h("div", { class: "files" });
  const picker = h("input", { type: "file", multiple: true, hidden: true, id: "attach-file", "aria-label": TEXT.attach,
    onchange: () => { attach(picker.files); picker.value = ""; } });

  function written() {
    write(whose, area.value);
    fit();
    clearTimeout(area.timer);
    area.timer = setTimeout(count, COUNT_MS);
  }

  // Only the model can count: nothing is shown where there is none, or where another server answers (style.css).
  async function count() {
    const text = area.value;
    const { tokens } = text.trim() ? await api("POST", elsewhere ? "/api/count" : "/api/draft", { text }).catch(() => ({ tokens: null })) : { tokens: null };
    if (text === area.value) counted.textContent = tokens === null ? "" : say("draft_tokens", { n: tokens.toLocaleString("en") });
  }

  // A long one would bury what is asked about it.
  async function pasted(event) {
    const text = event.clipboardData.getData("text/plain");
    if (event.clipboardData.files.length) {
      event.preventDefault();
      return attach(event.clipboardData.files);
    }
    if (text.length < LONG_PASTE) return;
    event.preventDefault();
    const into = whose, taken = attached().filter((file) => file.pasted).length;
    await add(into, { name: taken ? say("pasted_n", { n: taken + 1 }) : TEXT.pasted, text, pasted: true });
  }

  // What was not sent in a conversation waits there; a reload loses no word of it.
  function show() {
    whose = opened.id;
    area.value = unsent(whose);
    drawFiles();
    fit();
    count();
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
      const pdf = /\.pdf$/i.test(file.name);
      if (file.size > (pdf ? MOST_BYTES.pdf : MOST_BYTES.text)) {
        notice(say(pdf ? "pdf_large" : "text_large", { name: file.name }));
        continue;
      }
      const text = await readText(file).catch(() => null); // why not has been said
      if (text !== null) await add(into, { name: file.name, text });
    }
  }

  async function add(into, file) {
    const { tokens } = await api("POST", "/api/count", { text: file.text }).catch(() => ({ tokens: null }));
    kept.set(into, [...attached(into), { ...file, tokens }]);
    drawFiles();
  }

  function drawFiles() {
    files.replaceChildren(...attached().map((file) => h("span", { class: "file" },
      h("button", { type: "button", class: "file-name", onclick: () => preview(file) }, file.name), file.tokens !== null && h("small", {}, say("attached_tokens", { n: file.tokens })),
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
    h("div", { class: "under" }, meter, counted, h("span", { class: "hint" }, TEXT.shortcuts)));
}

// The text of a file; what is no plain UTF-8, the program reads.
async function readText(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    if (!text.includes("\0") && !text.startsWith("%PDF-")) return text;
  } catch { /* another encoding, or none */ }
  const data = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.readAsDataURL(file);
  });
  const { text, encoding } = await api("POST", "/api/attachments/text", { name: file.name, data });
  if (encoding) notice(say("read_as", { name: file.name, encoding: encoding.replace("_", "-").toUpperCase() }));
  return text;
}
