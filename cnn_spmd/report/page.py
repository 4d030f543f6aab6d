"""Write the blocks of a report as one HTML page.

The charts are in the page: it needs no other file and no network.
"""

import html
import re
from collections.abc import Sequence

from cnn_spmd.report.text import Block, Chart, Commands, Heading, Paragraph, Table

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #444; --line: #ddd;
  --edge: #555; --grid: #e6e6e6; --mark: #444; --faint: #aaa; --code: #f3f3f3;
  --blue: #0072b2; --shade: #0003 }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e4e4e4; --soft: #b4b4b4;
  --line: #383c42; --edge: #999; --grid: #2e3238; --mark: #c4c4c4; --faint: #777;
  --code: #22262c; --blue: #2f95d8; --shade: #fff3 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 84rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem }
p { max-width: 75em }
code { font: .9em/1.4 ui-monospace, monospace; background: var(--code) }
code span { display: inline-block }
pre { padding: .5rem; background: var(--code); white-space: pre-wrap }
/* Paper that moves with the table covers a shade that does not: it shows where more is hidden. */
.scroll { overflow-x: auto; background:
  linear-gradient(90deg, var(--paper) 40%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(270deg, var(--paper) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(90deg, var(--shade), transparent) left / .6rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--shade), transparent) right / .6rem 100% no-repeat scroll }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal }
th, td { padding: .25rem .45rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
th { border-bottom: 2px solid var(--edge); vertical-align: bottom }
td { white-space: nowrap } .n { text-align: right }
td.long { min-width: 16rem; white-space: normal; overflow-wrap: anywhere }
.facts { overflow-wrap: anywhere }
.facts td + td { white-space: normal; min-width: 0; text-align: left }
.one { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
.one .pictures { flex: 1 1 22rem } .one figcaption { flex: 1 1 20rem }
figure { margin: 0 }
.pictures { display: grid; gap: .5rem 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)) }
.pictures svg, .pictures img { width: 100%; max-width: 34rem; height: auto }
figcaption { font-size: .84rem; color: var(--soft); max-width: 75em }
/* The greys and the blue of the charts; matplotlib writes them into each element. A selector of
   what is in an svg element would not find what a marker uses. */
svg text { fill: var(--ink) }
text[style*="fill: #555555"] { fill: var(--edge) !important }
[style*="fill: #ffffff"] { fill: var(--paper) !important }
[style*="stroke: #e6e6e6"] { stroke: var(--grid) !important }
[style*="stroke: #555555"] { stroke: var(--edge) !important }
[style*="stroke: #000000"] { stroke: var(--ink) !important }
[style*="stroke: #222222"], [style*="stroke: #444444"], [style*="stroke: #777777"] {
  stroke: var(--mark) !important }
[style*="stroke: #aaaaaa"] { stroke: var(--faint) !important }
[style*="stroke: #0072b2"] { stroke: var(--blue) !important }
[style*="fill: #0072b2"] { fill: var(--blue) !important }
/* On a narrow page, each row is a list of its cells with their columns' names. */
@media (max-width: 600px) {
  thead { display: none }
  .rows tr { display: flex; flex-wrap: wrap; gap: 0 .5rem; padding: .3rem 0;
    border-bottom: 1px solid var(--edge) }
  .rows td { border: 0; padding: 0 .2rem; white-space: normal; min-width: 0; text-align: left }
  .rows td::before { content: attr(data-column) " "; color: var(--soft) }
  .rows td:empty { display: none }
}
@media print {
  body { max-width: none; font-size: 10pt; padding: 0 } svg, img, tr { break-inside: avoid }
  h2, h3 { break-after: avoid }
  .pictures { grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)) }
  .scroll { overflow: visible } table { font-size: 6.5pt } th, td { padding: .1rem .25rem }
  td, td.long { white-space: normal; min-width: 0 }
  td.n, .facts td:first-child { white-space: nowrap }
  td:first-child { overflow-wrap: anywhere }
}
"""


def as_html(blocks: Sequence[Block]) -> str:
    """Return the page; the first block is the heading that becomes its title."""
    title = html.escape(blocks[0].text)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style>"
    )
    start = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>'
    return "\n".join([start, *map(block_as_html, blocks), "</body></html>\n"])


def block_as_html(block: Block) -> str:
    """Return one block as an element of the page."""
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Table():
            return table_as_html(block)
        case Commands(lines):
            return f"<pre><code>{chr(10).join(map(command_as_html, lines))}</code></pre>"
        case Chart(title, pictures, caption):
            one = ' class="one"' if len(pictures) == 1 else ""
            return (
                f"<h3>{html.escape(title)}</h3>\n"
                f'<figure{one}><div class="pictures">{"".join(pictures)}</div>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )


def table_as_html(table: Table) -> str:
    """Return a table that scrolls sideways where the page is too narrow for it."""
    numbers = [holds_numbers(column) for column in zip(*table.rows, strict=True)]
    head = "".join(
        f"<th{kind_of(is_number)}>{html.escape(cell)}</th>"
        for cell, is_number in zip(table.header, numbers, strict=True)
    )
    body = "\n".join(
        f"<tr>{''.join(map(cell_as_html, row, table.header, numbers))}</tr>" for row in table.rows
    )
    start = f'<table class="rows"><thead><tr>{head}</tr></thead>'
    if not any(table.header):
        start = '<table class="facts">'
    return f'<div class="scroll">{start}\n<tbody>{body}</tbody></table></div>'


def holds_numbers(column: Sequence[str]) -> bool:
    """Return whether all cells of a column are numbers, except the empty ones."""
    return all(re.match(r"(-?[\d,.]+(e[+-]?\d+)?( [(±]|$)|$)", cell) for cell in column)


def kind_of(is_number: bool) -> str:
    """Return the attribute of a cell that puts it to the right where it is of numbers."""
    return ' class="n"' * is_number


def command_as_html(command: str) -> str:
    """Return a command that breaks between its words only: a browser would break within "--"."""
    return " ".join(f"<span>{word}</span>" for word in html.escape(command).split(" "))


def cell_as_html(text: str, column: str, is_number: bool) -> str:
    """Return a cell: numbers to the right, long texts and commands with line breaks."""
    kind = kind_of(is_number)
    shown = html.escape(text)
    if len(text) > 50:
        kind = ' class="long"'
    if text.startswith("python "):
        shown = f"<code>{command_as_html(text)}</code>"
    elif " " not in text and kind == ' class="long"':
        shown = shown.replace(",", ",<wbr>")  # a run's name
    data = f' data-column="{html.escape(column)}"' if column else ""
    return f"<td{data}{kind}>{shown}</td>"
