// Escape and a click elsewhere close what lies above the page: the menu of a row, and on a narrow window the two drawers.
const DRAWERS = { "show-left": "#left", "show-right": "#right" };
const menus = () => document.querySelectorAll("details.menu[open]");

// Whether there was something to close.
export function dismiss() {
  const open = menus(), drawers = Object.keys(DRAWERS).filter((name) => document.body.classList.contains(name));
  for (const menu of open) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
  if (!open.length) document.body.classList.remove(...drawers);
  return open.length + drawers.length > 0;
}

document.addEventListener("pointerdown", ({ target }) => {
  for (const menu of menus()) if (!menu.contains(target)) menu.open = false;
  if (target.closest(".bar button, .notice")) return; // those open and close them; a notice would move away from the click
  for (const [name, drawer] of Object.entries(DRAWERS)) if (!target.closest(drawer)) document.body.classList.remove(name);
});

// A menu is shown whole, whatever its row is cut off by: in place of below the window's edge it opens above its row.
export function placeMenu(menu, items) {
  const row = menu.getBoundingClientRect(), { offsetHeight: height, offsetWidth: width } = items;
  const below = row.bottom + height < window.innerHeight;
  items.style.top = `${below ? row.bottom : Math.max(0, row.top - height)}px`;
  items.style.left = `${Math.max(0, row.right - width)}px`;
}
