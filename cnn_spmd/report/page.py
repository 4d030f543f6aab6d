"""Write the blocks of a report as one HTML page.

The charts are in the page: it needs no other file and no network.
"""

import html
import re
from collections.abc import Sequence

from cnn_spmd.report.text import Block, Chart, Heading, Paragraph, Table

CSS = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1180px; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888; vertical-align: bottom }
td { white-space: nowrap } td.n { text-align: right }
td.long { min-width: 20rem; white-space: normal; overflow-wrap: anywhere }
.facts { overflow-wrap: anywhere } .facts td + td { white-space: normal; min-width: 0 }
.one { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
.one .pictures { flex: 1 1 22rem } .one figcaption { flex: 1 1 20rem }
figure { margin: 0 }
.pictures { display: grid; gap: .5rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)) }
.pictures svg, .pictures img { width: 100%; max-width: 34rem; height: auto }
figcaption { font-size: .84rem; color: #444; max-width: 75em }
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
        case Chart(title, pictures, caption):
            one = ' class="one"' if len(pictures) == 1 else ""
            return (
                f"<h3>{html.escape(title)}</h3>\n"
                f'<figure{one}><div class="pictures">{"".join(pictures)}</div>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )


def table_as_html(table: Table) -> str:
    """Return a table that scrolls sideways where the page is too narrow for it."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "\n".join(f"<tr>{''.join(map(cell_as_html, row))}</tr>" for row in table.rows)
    start = f"<table><thead><tr>{head}</tr></thead>"
    if not any(table.header):
        start = '<table class="facts">'
    return f'<div class="scroll">{start}\n<tbody>{body}</tbody></table></div>'


def cell_as_html(text: str) -> str:
    """Return a cell: numbers to the right, long texts with line breaks."""
    kind = ""
    if re.match(r"-?[\d,.]+( [(±]|$)", text):
        kind = ' class="n"'
    elif len(text) > 50:
        kind = ' class="long"'
    return f"<td{kind}>{html.escape(text)}</td>"
