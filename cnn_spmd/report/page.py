"""Write the blocks of a report as one HTML page.

The charts are in the page: it needs no other file and no network.
"""

import html
import pathlib
import re
from collections.abc import Sequence

from cnn_spmd.report.text import Block, Chart, Commands, Heading, Paragraph, Table

CSS = pathlib.Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def as_html(blocks: Sequence[Block]) -> str:
    """Return the page; the first block is the heading that becomes its title."""
    title = html.escape(blocks[0].text)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>\n{CSS}</style>"
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
    is_long = len(text) > 50
    kind = ' class="long"' if is_long else kind_of(is_number)
    shown = html.escape(text)
    if text.startswith("python "):
        shown = f"<code>{command_as_html(text)}</code>"
    elif is_long and " " not in text:
        shown = shown.replace(",", ",<wbr>")  # a run's name
    data = f' data-column="{html.escape(column)}"' if column else ""
    return f"<td{data}{kind}>{shown}</td>"
