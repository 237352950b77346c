// Whether the open conversation, or the one that this tab will begin, is answered by another server: by which model.
import { api, emit, on, opened, state } from "/ui/floe.js";
import { draft } from "/ui/conversation/settings.js";

export let elsewhere = ""; // "" for the engine here

export function watch() {
  on("opened", look);
  on("state", () => opened.id && look());
  on("remote", ({ whose, remote }) => whose === String(opened.id || draft()) && set(remote)); // chosen in this tab
  look();
}

async function look() {
  const { id } = opened;
  if (id) return set(state.conversations.find((each) => each.id === id)?.remote || "");
  const { settings } = await api("GET", `/api/settings?${new URLSearchParams({ whose: draft() })}`).catch(() => ({ settings: {} }));
  if (!opened.id) set(settings.remote || "");
}

function set(model) {
  elsewhere = model;
  document.body.classList.toggle("elsewhere", Boolean(model));
  emit("elsewhere", model);
}
