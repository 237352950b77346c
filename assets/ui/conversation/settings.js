// The settings of the open conversation, or of the one that this tab will begin next. A form belongs to one conversation
// for as long as it lives: what is typed into it is stored for that one, however late, and an answer that comes when
// another form is shown reaches nobody.
import { TEXT, api, emit, h, notice, on, opened, ready, start, state } from "/ui/floe.js";

const DRAFT = "floe-draft-settings";
const PAUSE_MS = 500; // after the last key; the end of a field, a send and another conversation store at once
// Of each field of sampling its step and the ends of its slider; what lies beyond them can be typed. A seed has no slider.
const NUMBERS = { temperature: [0.05, 0, 2], max_tokens: [16, 16, 4096], top_p: [0.01, 0, 1], top_k: [1, 0, 200], min_p: [0.01, 0, 1],
  repetition_penalty: [0.01, 1, 2], seed: [1] };
let place = null, form = null, unfolded = false;

export async function mount(root) {
  await ready;
  place = root;
  on("opened", show);
  on("state", () => form.hint());
  on("presence", (now) => now === "here" && form.read());
  start();
  show();
}

function show() {
  const whose = opened.id ? String(opened.id) : draft();
  if (form?.whose === whose) return;
  form?.store();
  form = settingsForm(whose);
  place.replaceChildren(form.node);
}

// What has been typed is with the program; whoever sends a message waits for that.
export const stored = () => form?.store();

// The draft becomes the conversation `id`: its form stays, with what is being typed into it.
export function begin(id) {
  if (form) form.node.dataset.whose = form.whose = String(id);
  sessionStorage.removeItem(DRAFT);
}

// The name under which the program keeps the settings of a conversation that has not begun.
export function draft() {
  if (!sessionStorage.getItem(DRAFT)) sessionStorage.setItem(DRAFT, crypto.randomUUID?.() || `draft-${Math.random()}`);
  return sessionStorage.getItem(DRAFT);
}

function settingsForm(whose) {
  const dirty = new Set(), fields = makeFields(typed, store);
  let asked = Promise.resolve(), last = null, timer;
  const node = h("fieldset", { class: "panel settings", id: "settings", disabled: true, "aria-label": TEXT.tab_chat,
    "data-whose": whose });
  const own = { whose, node, store, hint, read: () => ask("GET", "") };
  const preset = h("select", { id: "preset", onchange: () => ask("PATCH", "", { preset: preset.value }) });
  const name = h("input", { id: "preset-name", maxlength: 60, placeholder: TEXT.preset_hint, "aria-label": TEXT.preset_name,
    onkeydown: (event) => event.key === "Enter" && keepPreset() });
  const quiet = (id, label, onclick) => h("button", { type: "button", class: "quiet", id, onclick }, label);
  node.append(fields.remote.node, fields.system.node, labelled(TEXT.preset, preset), ...["thinking", "effort", "keep_thinking", "policy"].map((each) =>
    fields[each].node),
  h("details", { open: unfolded, ontoggle: (event) => { unfolded = event.target.open; } }, h("summary", {}, TEXT.advanced),
    ...Object.keys(NUMBERS).map((each) => fields[each].node)), quiet("reset", TEXT.reset, reset), name, h("div", { class: "model-buttons" },
    quiet("preset-keep", TEXT.preset_keep, keepPreset), quiet("preset-forget", TEXT.preset_forget, () =>
      ask("DELETE", "/preset", { name: preset.value }))));

  // One request after the other, so that the newest answer comes last.
  function ask(method, path, body) {
    asked = asked.then(() => api(method, `/api/settings${path}?${new URLSearchParams({ whose: own.whose })}`, body))
      .then((answer) => { last = answer; }, () => {}).then(draw); // what was refused has been said, and is put back
    return asked;
  }

  function typed(each) {
    dirty.add(each);
    clearTimeout(timer);
    timer = setTimeout(store, PAUSE_MS);
  }

  function store() {
    clearTimeout(timer);
    const bad = [...dirty].find((each) => fields[each].input.validity?.badInput);
    if (bad) notice(TEXT.not_a_number);
    const changes = Object.fromEntries([...dirty].filter((each) => each !== bad).map((each) => [each, fields[each].get()]));
    dirty.clear();
    return Object.keys(changes).length || bad ? ask("PATCH", "", { changes }) : asked;
  }

  function draw() {
    if (form !== own || !last) return;
    node.disabled = false;
    const { remotes, settings: { remote = "" } } = last, gone = remote && !remotes.includes(remote) ? [remote] : [];
    fields.remote.node.hidden = !remotes.length && !remote;
    fields.remote.input.replaceChildren(...["", ...gone, ...remotes].map((value) => h("option", { value }, value || TEXT.remote_here)));
    for (const [each, field] of Object.entries(fields)) if (!dirty.has(each)) field.set(last.settings[each]);
    preset.replaceChildren(...last.presets.map(([label, value]) => h("option", { value }, label)));
    preset.value = last.preset;
    emit("remote", { whose, remote });
    hint();
  }

  // What the open model recommends, and which wishes its chat template knows.
  function hint() {
    const { sampling = {}, wishes } = last?.settings.remote ? {} : state.model; // of another server's it is not known
    for (const each of Object.keys(NUMBERS)) fields[each].recommend(sampling[each]);
    fields.thinking.node.hidden = Boolean(wishes) && !wishes.some((wish) => wish === "enable_thinking" || wish === "thinking");
    fields.effort.node.hidden = Boolean(wishes) && !wishes.includes("reasoning_effort");
  }

  function reset() {
    dirty.clear();
    const others = Object.keys(last.settings).filter((each) => each !== "system" && each !== "remote");
    ask("PATCH", "", { changes: Object.fromEntries(others.map((each) => [each, null])) });
  }

  async function keepPreset() {
    await store();
    await ask("POST", "/preset", { name: name.value });
    if (last.preset === name.value.trim()) name.value = "";
  }

  own.read();
  return own;
}

// The label stands beside its control: inside it, the options and the help would belong to the name.
function labelled(label, control, help) {
  const id = control.id;
  if (help) control.setAttribute("aria-describedby", `${id}-help`);
  return h("div", { class: "field" }, h("label", { for: id }, label), control, help && h("small", { id: `${id}-help` }, help));
}

// A number with a slider for the pointer; the keyboard has the number. Where it is empty, the slider is where the model's own is.
function withSlider(field, step, [least, most]) {
  const { input, set } = field;
  const slider = most !== undefined && h("input", { type: "range", step, min: least, max: most, tabindex: -1, "aria-hidden": "true",
    oninput: () => { input.value = slider.value; input.dispatchEvent(new Event("input")); },
    onchange: () => input.dispatchEvent(new Event("change")) });
  const follow = () => {
    if (!slider) return;
    slider.value = input.value || input.placeholder || (input.id === "setting-max_tokens" ? most : least); // no limit is the most
    slider.classList.toggle("unset", input.value === "");
  };
  field.get = () => (input.value === "" ? null : Number(input.value));
  field.set = (value) => { set(value); follow(); };
  field.recommend = (value) => { input.placeholder = value ?? ""; follow(); };
  input.addEventListener("input", follow);
  if (slider) input.before(slider);
  field.node.classList.add("number");
}

// {node, input, get, set} of each setting; of a number also recommend(its model's own); what is empty is the model's own.
function makeFields(typed, store) {
  const fields = {};
  const add = (each, tag, attributes, ...children) => {
    const input = h(tag, { id: `setting-${each}`, ...attributes, oninput: () => typed(each), onchange: () => { typed(each); store(); } }, ...children);
    fields[each] = { input, node: labelled(TEXT[`setting_${each}`], input, TEXT[`help_${each}`]), get: () => input.value || null,
      set: (value) => { if (input.value !== String(value ?? "")) input.value = value ?? ""; } };
  };
  const choice = (each, ...names) => add(each, "select", {}, ...names.map(([value, label]) => h("option", { value }, label)));
  choice("remote");
  add("system", "textarea", { rows: 4, placeholder: TEXT.system_hint, dir: "auto" });
  for (const [each, [step, ...ends]] of Object.entries(NUMBERS)) {
    add(each, "input", { type: "number", step: "any" });
    withSlider(fields[each], step, ends);
  }
  choice("thinking", ["", TEXT.think_model], ["on", TEXT.think_on], ["off", TEXT.think_off]);
  fields.thinking.get = () => ({ on: true, off: false })[fields.thinking.input.value] ?? null;
  const setThinking = fields.thinking.set;
  fields.thinking.set = (value) => setThinking(value === undefined ? "" : value ? "on" : "off");
  choice("effort", ["", TEXT.think_model], ...["low", "medium", "high"].map((name) => [name, TEXT[`effort_${name}`]]));
  choice("policy", ["", TEXT.policy_oldest], ["stop", TEXT.policy_stop], ["newest", TEXT.policy_newest]);
  add("keep_thinking", "input", { type: "checkbox" });
  fields.keep_thinking.get = () => fields.keep_thinking.input.checked || null;
  fields.keep_thinking.set = (value) => { fields.keep_thinking.input.checked = Boolean(value); };
  return fields;
}
