// Keys for programs, and the lines that connect them.
import { TEXT, api, h, notice, say, toClipboard } from "/ui/floe.js";
import { line } from "/ui/preferences/page.js";

const button = (text, onclick) => h("button", { type: "button", class: "quiet", onclick }, text);

export async function draw(place, fresh) {
  const { keys, model } = await api("GET", "/api/preferences/programs");
  const base = `${location.origin}/v1`;
  const name = h("input", { id: "api-key-name", type: "text", maxlength: 100, placeholder: TEXT.api_key_placeholder, "aria-label": TEXT.api_key_name,
    onkeydown: (event) => event.key === "Enter" && make() });
  const shown = keys.map((key) => h("li", { class: "with-button" },
    h("span", {}, key.name, " ", h("small", {}, say("api_made_on", { date: new Date(1000 * key.made_at).toLocaleDateString() }))),
    button(TEXT.api_revoke, () => revoke(key))));
  place.replaceChildren(h("p", {}, TEXT.api_about), line(TEXT.api_address, copied(base)),
    line(TEXT.api_keys, keys.length ? h("ul", { id: "api-keys" }, ...shown) : h("span", {}, TEXT.api_no_keys)),
    line(TEXT.api_key_name, h("span", { class: "with-button" }, name, button(TEXT.api_make, make))),
    fresh ? line(TEXT.api_new_key, copied(fresh, "api-new-key")) : "",
    h("details", { id: "api-lines" }, h("summary", {}, TEXT.api_lines),
      ...Object.entries(lines(base, model, fresh || TEXT.api_lines_key)).map(([kind, text]) =>
        h("div", { class: "api-line" }, h("span", {}, TEXT[`api_lines_${kind}`]), copied(text)))));

  async function make() {
    const { key } = await api("POST", "/api/preferences/programs/keys", { name: name.value });
    await draw(place, key);
    place.querySelector("#api-lines").open = true;
  }

  async function revoke(key) {
    if (!confirm(say("api_really_revoke", { name: key.name }))) return;
    await api("DELETE", `/api/preferences/programs/keys/${key.id}`);
    notice(say("api_revoked", { name: key.name }));
    draw(place);
  }
}

function copied(text, id = null) {
  const copy = button(TEXT.copy, async () => {
    await toClipboard(text);
    copy.textContent = TEXT.copied;
  });
  return h("span", { class: "with-button" }, h("code", { id }, text), copy);
}

// No key stands among a command's arguments, where every user of a computer can read it.
function lines(base, model, key) {
  const question = JSON.stringify({ model, messages: [{ role: "user", content: "Hello!" }] });
  return {
    environment: `OPENAI_BASE_URL=${base}\nOPENAI_API_KEY=${key}`,
    curl: `printf 'Authorization: Bearer %s' '${key}' | curl -H @- -H 'Content-Type: application/json' -d '${question}' ${base}/chat/completions`,
    python: `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key="${key}")\n`
      + `answer = client.chat.completions.create(model="${model}", messages=[{"role": "user", "content": "Hello!"}])\n`
      + "print(answer.choices[0].message.content)",
    continue: `models:\n  - name: ${model}\n    provider: openai\n    model: ${model}\n    apiBase: ${base}\n    apiKey: ${key}`,
    zed: JSON.stringify({ language_models: { openai_compatible: { "Floe Chat": { api_url: base,
      available_models: [{ name: model, max_tokens: 8192 }] } } } }, null, 2),
    aider: `export OPENAI_API_BASE=${base} OPENAI_API_KEY=${key}\naider --model openai/${model}`,
  };
}
