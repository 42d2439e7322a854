"""Style sheet of the pages, for light, dark, narrow and printed views, and a sorting script."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfcf9; --ink: #21201c; --soft: #6a665c; --rule: #dedad0; --wash: #f4f1ea;
  --hue: #1c5d87; --other: #b1502a;
  --text: Charter, "Bitstream Charter", "Sitka Text", Cambria, "Liberation Serif", Georgia, serif;
  --figures: system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --code: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --ink: #e4e1d9; --soft: #9d998f; --rule: #35363b; --wash: #1e2024;
    --hue: #79b6e3; --other: #e3976c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.55 var(--text); -webkit-text-size-adjust: 100%;
}
main { max-width: 61rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 600; margin: 0 0 .35rem;
  overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; font-weight: 600; margin: 3rem 0 .4rem;
  break-after: avoid; }
h3 { font: 600 .8125rem/1.4 var(--code); margin: 0 0 .2rem; overflow-wrap: anywhere;
  break-after: avoid; }
p { margin: 0 0 .8rem; max-width: 42rem; overflow-wrap: anywhere; }
ul { margin: 0 0 .8rem; padding-left: 1.2rem; max-width: 42rem; overflow-wrap: anywhere; }
code { font: .85em/1.4 var(--code); overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); }
.said { border-left: 3px solid var(--other); padding: .1rem 0 .1rem .9rem; margin: 1.2rem 0; }

.key { display: grid; gap: 1.1rem 1.75rem; margin: 1.75rem 0 0; padding: 1.2rem 0;
  grid-template-columns: repeat(3, 1fr);
  border: solid var(--rule); border-width: 1px 0; }
.key dt { color: var(--soft); font-size: .9375rem; line-height: 1.3; }
.key dd { margin: .1rem 0 0; font-size: 1.55rem; line-height: 1.25;
  font-variant-numeric: lining-nums tabular-nums; }
.key small { display: block; font-size: .875rem; line-height: 1.35; color: var(--soft); }

figure { margin: 1rem 0 1.6rem; }
figcaption { font-size: .9375rem; line-height: 1.45; margin-top: .35rem; max-width: 42rem; }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg text { font: 11px var(--figures); fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .role { font: 11.5px var(--code); fill: var(--ink); }
svg .name { fill: var(--ink); }
.hue { fill: var(--hue); } .other { fill: var(--other); } .paper { fill: var(--paper); }
.line { fill: none; stroke: var(--hue); stroke-width: 1.3; stroke-linejoin: round; }
.axis { stroke: var(--rule); stroke-width: 1; fill: none; }
.mark { stroke: var(--other); stroke-width: 1; stroke-dasharray: 3 3; }
.empty { fill: none; stroke: var(--rule); }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll > svg { max-width: none; }
.multiples { display: grid; gap: 1.5rem 1.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr)); }
.multiples figure { margin: 0; break-inside: avoid; }
.multiples svg { width: 100%; max-width: 25rem; }

table { border-collapse: collapse; font: .875rem/1.4 var(--figures);
  font-variant-numeric: tabular-nums; margin: .3rem 0 1rem; }
th, td { padding: .26rem .5rem; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-weight: 500; color: var(--soft); vertical-align: bottom; line-height: 1.25;
  border-bottom-color: var(--soft); }
tbody th { font-weight: 400; white-space: nowrap; }
.n { text-align: right; }
td.n, .word { white-space: nowrap; }
.id { font: .8125rem/1.4 var(--code); }
.beside { display: grid; gap: 0 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.beside table { width: 100%; }
.multiples + p { margin-top: 1.5rem; }
h3.plain { font: 600 .9375rem/1.4 var(--text); margin-top: .6rem; }
.wide { overflow-wrap: anywhere; min-width: 9rem; }
.bar { min-width: 6rem; width: 20rem; padding-right: 0; }
.bar svg { width: 100%; height: .8em; overflow: hidden; }
th button { all: unset; cursor: pointer; }
th button:hover { color: var(--ink); }
th button:focus-visible { outline: 2px solid var(--hue); outline-offset: 2px; }
th[aria-sort] button { color: var(--ink); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
footer { margin-top: 3.5rem; padding-top: .8rem; border-top: 1px solid var(--rule);
  font-size: .9375rem; color: var(--soft); overflow-wrap: anywhere; }

@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.55rem; }
  tbody th { white-space: normal; }
  th:first-child:not(.long) { position: sticky; left: 0; background: var(--paper); }
  .key { grid-template-columns: repeat(2, 1fr); gap: 1rem 1.25rem; }
  .key dd { font-size: 1.3rem; }
}
@media print {
  @page { margin: 16mm 14mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 1.6rem; }
  .scroll { overflow: visible; }
  .scroll > svg { max-width: 100%; }
  .multiples { grid-template-columns: repeat(3, 1fr); }
  .beside { grid-template-columns: 1fr 1fr; }
  table { font-size: 7.5pt; }
  .id { font-size: 7pt; }
  tr, figure { break-inside: avoid; }
  thead { display: table-header-group; }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th[aria-sort]").forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column];
        const text = cell.dataset.value ?? cell.textContent;
        return text !== "" && isFinite(text) ? Number(text) : text;
      };
      const compare = (a, b) => typeof a === "number" && typeof b === "number"
        ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => compare(value(a), value(b)));
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}
"""
