// The columns beside the conversation. On a wide window the list of conversations is open until somebody closes it, engine
// and settings are closed until somebody opens them, which this browser remembers. On a narrow one both are drawers.
import { TEXT } from "/ui/floe.js";

const KEPT = "floe-right";
const classes = () => document.body.classList;
export const narrow = () => matchMedia("(max-width: 1100px)").matches;

export const toggleList = () => classes().toggle(narrow() ? "show-left" : "hide-left");
const rightIsOpen = () => classes().contains(narrow() ? "show-right" : "open-right");

function setRight(open) {
  classes().toggle(narrow() ? "show-right" : "open-right", open);
  if (!narrow()) localStorage.setItem(KEPT, open ? "open" : "");
}

// A tab of the right column; once more closes it.
export function toggleTab(name) {
  const tab = [...document.querySelectorAll("#right button[role=tab]")].find((each) => each.textContent.trim() === TEXT[name]);
  const there = rightIsOpen() && tab.getAttribute("aria-selected") === "true";
  setRight(!there);
  if (!there) tab.click();
}

export function restoreDrawers() {
  classes().toggle("open-right", localStorage.getItem(KEPT) === "open");
}
