// The three figures on top of the engine's panel: how fast, what crosses the link, what was found in the cache.
import { TEXT, h, on, ready } from "/ui/floe.js";

export async function mount(root) {
  await ready;
  const figure = (id, unit) => {
    const number = h("b", { id }, "–");
    return { number, node: h("div", {}, number, h("small", {}, unit)) };
  };
  const speed = figure("speed-now", TEXT.tokens_per_second), link = figure("link-now", TEXT.figure_link), cached = figure("hit-now", TEXT.figure_cached);
  root.replaceChildren(h("div", { class: "figures", role: "group", "aria-label": TEXT.tab_engine }, speed.node, link.node, cached.node));
  on("stats", (stats) => {
    const { counters = {} } = stats;
    speed.number.textContent = short(stats.tokens_per_second);
    link.number.textContent = short(stats.far_bytes_per_second === undefined ? undefined : stats.far_bytes_per_second / 1e6);
    cached.number.textContent = counters.needed_bytes ? `${Math.round((100 * counters.hit_bytes) / counters.needed_bytes)} %` : "–";
  });
}

const short = (n) => (n === undefined ? "–" : n.toFixed(n < 100 && n > 0 ? 1 : 0));
