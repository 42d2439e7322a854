"""Style and script of the live page, beside those of all pages."""

LIVE_STYLE = """
.state { margin: .9rem 0 0; max-width: none; }
.badge { font: 600 .8125rem/1 var(--figures); padding: .22rem .6rem .26rem; border-radius: 1rem;
  border: 1px solid currentColor; color: var(--soft); margin-right: .35rem; white-space: nowrap; }
.badge.running, .badge.done { color: var(--hue); }
.badge.failed, .badge.lost, .badge.stopped { color: var(--other); }
.error { font: .875rem/1.45 var(--code); overflow-wrap: anywhere; margin: .9rem 0; }
a { color: var(--hue); text-underline-offset: .15em; }
.cut { margin: 0 0 1.2rem; }
svg .done { fill: var(--hue); }
svg .earlier { fill: var(--hue); fill-opacity: .45; }
svg .part { fill: var(--hue); fill-opacity: .25; }
svg .busy { fill: var(--wash); stroke: var(--hue); stroke-width: 1.5; }
svg .lost { fill: var(--other); }
.second { stroke: var(--other); }
.legend { font-size: .9375rem; margin: .4rem 0 0; max-width: none; }
.legend span { white-space: nowrap; margin-right: 1rem; }
.sample { display: inline-block; width: .95em; height: .8em; border-radius: 1px;
  background: var(--hue); }
.sample.earlier { opacity: .45; }
.sample.busy { background: var(--wash); box-shadow: inset 0 0 0 1.5px var(--hue); }
.sample.lost { background: var(--other); }
.sample.empty { background: none; box-shadow: inset 0 0 0 1px var(--rule); }
.losses { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
@media (prefers-reduced-motion: no-preference) {
  svg .busy { animation: busy 1s ease-in-out infinite alternate; }
  @keyframes busy { to { fill: var(--hue); fill-opacity: .45; } }
}
"""

LIVE_SCRIPT = """
const live = document.getElementById("live");
const cut = document.querySelector(".cut");
let ahead = 0;
const duration = (seconds) => {
  const whole = Math.max(Math.floor(seconds), 0);
  const two = (n) => String(n).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  if (hours) return `${hours}h${two(minutes)}m`;
  return minutes ? `${minutes}m${two(whole % 60)}s` : `${whole}s`;
};
const tick = () => {
  const now = Date.now() / 1000 - ahead;
  for (const each of document.querySelectorAll("time[data-since]")) {
    each.textContent = duration(now - Number(each.dataset.since));
  }
};
const show = () => {
  for (const each of document.querySelectorAll("time[data-at]")) {
    each.textContent = new Date(1000 * Number(each.dataset.at)).toLocaleString();
  }
  document.title = document.querySelector("[data-title]")?.dataset.title ?? document.title;
  tick();
};
const source = new EventSource(`/events?after=${encodeURIComponent(live.dataset.mark)}`);
source.addEventListener("open", () => { cut.hidden = true; });
source.addEventListener("error", () => { cut.hidden = false; });
source.addEventListener("clock", (event) => {
  ahead = Date.now() / 1000 - Number(event.data);
  tick();
});
source.addEventListener("sections", (event) => {
  for (const [name, content] of Object.entries(JSON.parse(event.data))) {
    const place = document.getElementById(`live-${name}`);
    const scrolled = [...place.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
    place.innerHTML = content;
    place.querySelectorAll(".scroll").forEach((each, n) => { each.scrollLeft = scrolled[n] ?? 0; });
  }
  show();
});
source.addEventListener("ended", () => {
  source.close();
  location.replace("/report");
});
setInterval(tick, 1000);
show();
"""
