// Light, dark, or as the system has it; kept by this browser.
const KEPT = "floe-theme", DARK = matchMedia("(prefers-color-scheme: dark)");

export const theme = () => localStorage.getItem(KEPT) || "system";

export function setTheme(name) {
  if (name === "system") localStorage.removeItem(KEPT);
  else localStorage.setItem(KEPT, name);
  applyTheme();
}

export function applyTheme() {
  document.body.classList.toggle("dark", theme() === "system" ? DARK.matches : theme() === "dark");
}

export const switchTheme = () => setTheme(document.body.classList.contains("dark") ? "light" : "dark");

DARK.addEventListener("change", applyTheme);
