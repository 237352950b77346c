// The place to write: text, attached text files with their token count, Send and Stop.
import { TEXT, api, button, emit, h, notice, on, say } from "/ui/floe.js";

const MOST_BYTES = 1_000_000;
const DRAFT = "floe-draft-text";

export function composer(send, meter) {
  let attachments = [];
  const area = h("textarea", { id: "message", rows: "1", placeholder: TEXT.placeholder, "aria-label": TEXT.message,
    oninput: written, onkeydown: key });
  area.value = sessionStorage.getItem(DRAFT) || ""; // a reload loses nothing
  const files = h("div", { class: "files" });
  const picker = h("input", { type: "file", multiple: true, hidden: true, id: "attach-file", "aria-label": TEXT.attach,
    onchange: () => { attach(picker.files); picker.value = ""; } });

  function written() {
    sessionStorage.setItem(DRAFT, area.value);
    fit();
  }

  function fit() {
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight, 240)}px`;
  }

  function key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  }

  async function submit() {
    const text = area.value, attached = attachments;
    if (!text.trim() && !attached.length) return;
    area.value = "";
    attachments = [];
    drawFiles();
    written();
    try {
      await send(text, attached.map(({ name, text: content }) => ({ name, text: content })));
    } catch {
      area.value = [text, area.value].filter(Boolean).join("\n"); // nothing that was written gets lost
      attachments = attached;
      drawFiles();
      written();
    }
  }

  async function attach(chosen) {
    for (const file of chosen) {
      if (file.size > MOST_BYTES) { notice(say("too_large", { name: file.name })); continue; }
      const text = await readText(file);
      if (text === null) { notice(say("not_text", { name: file.name })); continue; }
      const { tokens } = await api("POST", "/api/count", { text });
      attachments.push({ name: file.name, text, tokens });
    }
    drawFiles();
  }

  function drawFiles() {
    files.replaceChildren(...attachments.map((file) => h("span", { class: "file" }, file.name,
      file.tokens !== null && h("small", {}, say("attached_tokens", { n: file.tokens })),
      button("close", `${TEXT.remove} ${file.name}`, () => {
        attachments = attachments.filter((other) => other !== file);
        drawFiles();
      }))));
  }

  on("focus", () => area.focus());
  on("draft", (text) => { area.value = [area.value, text].filter(Boolean).join("\n"); written(); area.focus(); });
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
