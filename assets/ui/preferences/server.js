// Another server that conversations can be sent to. Its key is never told to the page: what is left empty stays.
import { TEXT, api, h, notice, patiently, say } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";

const SECRET = "••••••••"; // in place of a key that is stored

export async function draw(place) {
  const server = await api("GET", "/api/preferences/server");
  const address = h("input", { id: "server-address", value: server.address || "", placeholder: "http://localhost:8000/v1",
    spellcheck: "false", autocomplete: "off" });
  const key = h("input", { id: "server-key", type: "password", placeholder: server.has_key ? SECRET : "", autocomplete: "off" });
  const quiet = (id, text, onclick) => h("button", { type: "button", class: "quiet", id, onclick }, text);
  const models = h("details", { id: "server-models" }, h("summary", {}, say("server_models", { n: (server.models || []).length })),
    h("ul", {}, ...(server.models || []).map((name) => h("li", {}, h("code", {}, name)))));
  const buttons = h("div", { class: "model-buttons" }, quiet("server-ask", TEXT.server_ask, ask),
    server.address && quiet("server-forget", TEXT.server_forget, forget));
  place.replaceChildren(h("p", {}, TEXT.server_about), line(TEXT.server_address_of, address, TEXT.server_address_help),
    line(TEXT.server_key_of, key, TEXT.server_key_help), buttons, ...(server.models ? [models] : []));

  async function ask() {
    const { models: found } = await patiently(buttons, TEXT.server_asking, (signal) =>
      api("POST", "/api/preferences/server", { address: address.value, key: key.value || null }, signal));
    notice(say("server_chosen", { n: found.length }));
    draw(place);
  }

  async function forget() {
    await api("DELETE", "/api/preferences/server");
    draw(place);
  }
}
