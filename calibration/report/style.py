"""The report's style sheet: light and dark after the reader's setting, black on white in print."""

STYLE = """
:root { --ink: #1c2024; --soft: #5b6570; --line: #d7dce1; --page: #ffffff; --panel: #f5f7f9;
  --bar: #2f6fb2; --alert: #a04000; --alert-page: #fff4e8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #363d45; --page: #14171a; --panel: #1d2227;
    --bar: #6ea8e0; --alert: #ffb37a; --alert-page: #33261a; } }
* { box-sizing: border-box; }
body { margin: 2rem auto; padding: 0 1.25rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
.verdict { font-size: 1.1rem; margin: 0 0 1rem; }
.note { color: var(--soft); margin: .25rem 0 .75rem; max-width: 48rem; }
.warnings { margin: 0; padding: .75rem 1rem .75rem 2.25rem; border-left: 4px solid var(--alert);
  background: var(--alert-page); }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; max-width: 8rem;
  text-wrap: balance; }
tbody th { font-weight: 500; white-space: nowrap; }
td { white-space: nowrap; }
tfoot th, tfoot td { font-weight: 700; border-bottom: 0; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.settings thead { display: none; }
svg { display: block; width: 100%; min-width: 40rem; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .small { font-size: 10px; }
svg .bar { fill: var(--bar); }
svg .kept { fill: var(--page); stroke: var(--alert); stroke-width: 1.5; }
svg .axis, svg .zero { stroke: var(--soft); }
svg .grid { stroke: var(--line); stroke-dasharray: 2 3; }
svg .rest { fill: none; stroke: var(--line); }
svg .line { fill: none; stroke: var(--alert); stroke-width: 1.5; }
svg .area { fill: var(--bar); fill-opacity: .45; }
svg .figure { fill: var(--ink); }
svg .interval { stroke: var(--bar); stroke-width: 2; }
summary { cursor: pointer; color: var(--soft); }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; background: var(--panel); border-radius: 6px; }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  image-rendering: pixelated; background: #888; }
figcaption { margin-top: .4rem; font-size: .85rem; overflow-wrap: anywhere; }
figcaption > * { display: block; }
.other { color: var(--alert); font-weight: 600; }
@media print {
  body { margin: 0; max-width: none; font-size: 11px; }
  svg { min-width: 0; }
  section, figure, tr, svg { break-inside: avoid; }
  svg, figure, .warnings { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
