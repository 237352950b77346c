// Gradio's controls show the settings of the open conversation, or of the one that this tab will begin next. They are
// asked to one at a time, and nothing can be typed into them while they show another one's: so what is typed is stored
// for the conversation that is seen, however late an answer comes.
import { opened } from "/ui/floe.js";

const DRAFT = "floe-draft-settings";
const LOOK_MS = 50, PATIENCE_MS = 5000; // without an answer by then it is asked again
let trigger = null, shown = null, asked = null; // names: whose settings the controls show, and whose they will
let turn = 0, since = 0, looking = 0, again = false;

export function bind(gradioTrigger) {
  trigger = gradioTrigger;
  showSettings();
}

// Another conversation was opened, or the model knows other wishes.
export function showSettings() {
  lock();
  if (looking) again = true; // when the answer that is under way has come
  else ask();
}

// The draft becomes the conversation `id`: the controls show its settings already, and what is being typed stays.
export function begin(id) {
  const name = draft();
  sessionStorage.removeItem(DRAFT);
  if (shown === name) shown = String(id);
  if (asked === name) asked = String(id);
}

function ask() {
  asked = settingsOf();
  again = false;
  since = performance.now();
  turn += 1;
  trigger("select", { name: asked, same: shown === asked, turn });
  looking = setTimeout(look, LOOK_MS);
}

function look() {
  looking = 0;
  if (document.querySelector("#opened textarea")?.value.endsWith(` ${turn}`)) {
    shown = asked;
    if (again) ask();
  } else if (performance.now() - since > PATIENCE_MS) ask();
  else looking = setTimeout(look, LOOK_MS);
  lock(); // each time: the controls are made when their tab is first opened
}

function lock() {
  const controls = document.getElementById("settings"), name = settingsOf();
  if (controls) controls.inert = shown !== name || asked !== name;
}

const settingsOf = () => (opened.id ? String(opened.id) : draft());

// The name under which the program keeps the settings of a conversation that has not begun.
export function draft() {
  if (!sessionStorage.getItem(DRAFT)) sessionStorage.setItem(DRAFT, crypto.randomUUID());
  return sessionStorage.getItem(DRAFT);
}
