// Where models come from: a mirror of the Hub, and the hosts that downloads may be sent on to.
import { TEXT, api, h, notice, say } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";

export async function draw(place) {
  const now = await api("GET", "/api/preferences/downloads");
  const mirror = h("input", { id: "downloads-mirror", type: "url", placeholder: "https://huggingface.co", spellcheck: "false" });
  const hosts = h("input", { id: "downloads-hosts", type: "text", spellcheck: "false" });
  [mirror.value, hosts.value] = [now.mirror, now.hosts.join(" ")];
  const about = now.variable ? say("downloads_variable", { address: now.variable }) : TEXT.downloads_mirror_about;
  place.replaceChildren(line(TEXT.downloads_mirror, mirror, about), line(TEXT.downloads_hosts, hosts, TEXT.downloads_hosts_about),
    h("div", { class: "model-buttons" }, h("button", { type: "button", class: "quiet", id: "downloads-keep", onclick: keep }, TEXT.save)));

  async function keep() {
    await api("POST", "/api/preferences/downloads", { mirror: mirror.value, hosts: hosts.value });
    notice(TEXT.downloads_kept);
    draw(place);
  }
}
