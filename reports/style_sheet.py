"""The report's style sheet: one column, readable on paper, light or dark as the reader's system is."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f6f8fa; --ink: #1f2328; --soft: #59636e;
  --line: #d0d7de; --error: #b42318; --warning: #8a5300; --advice: #0550ae; --good: #116329; }
@media (prefers-color-scheme: dark) { :root { --back: #161b22; --card: #1f2630; --ink: #e6edf3; --soft: #9da7b3;
  --line: #30363d; --error: #ff8a80; --warning: #e9b44c; --advice: #79b8ff; --good: #6fdd8b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .3rem 0; }
.soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin-top: 1.3rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.finding { border: 1px solid var(--line); border-left: 5px solid var(--tone); border-radius: 8px;
  background: var(--card); padding: .8rem 1rem; margin: .8rem 0; }
.finding h3 span { color: var(--tone); text-transform: uppercase; font-size: .75rem; letter-spacing: .05em; margin-left: .5rem; }
.error { --tone: var(--error); } .warning { --tone: var(--warning); } .advice { --tone: var(--advice); } .good { --tone: var(--good); }
figure { margin: 1rem 0 1.6rem; }
figure img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; display: block; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .88em; }
@media print { body { max-width: none; padding: 0; } figure, .finding { break-inside: avoid; } }
"""
