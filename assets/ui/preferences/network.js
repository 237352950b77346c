// The password for other devices. It is never told to the page: what is stored is not it.
import { TEXT, api, h, notice } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";

export async function draw(place) {
  const { has_password: set } = await api("GET", "/api/preferences/network");
  const password = h("input", { id: "network-password", type: "password", autocomplete: "new-password" });
  const quiet = (id, text, onclick) => h("button", { type: "button", class: "quiet", id, onclick }, text);
  place.replaceChildren(h("p", {}, TEXT.network_about), line(TEXT.network_password, password, set ? TEXT.network_set : TEXT.network_unset),
    h("div", { class: "model-buttons" }, quiet("network-set", TEXT.network_keep, keep), set && quiet("network-forget", TEXT.network_forget, forget)));

  async function keep() {
    await api("POST", "/api/preferences/network", { password: password.value });
    notice(TEXT.network_kept);
    draw(place);
  }

  async function forget() {
    await api("DELETE", "/api/preferences/network");
    draw(place);
  }
}
