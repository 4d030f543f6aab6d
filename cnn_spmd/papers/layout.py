"""Lay out the pages of results/ as Markdown.

The text of a page is its template in results/templates. A name in braces is filled in with a table,
a number or a section that is made from results/data, or with a text that pages share. A section
without data is empty.
"""

import textwrap
from collections.abc import Mapping, Sequence

from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report.text import markdown_table

TEMPLATES = DATA.parent / "templates"
COMMAND = "python -m cnn_spmd.papers --write"
HEAD = f"Generated from [data/](data) and [templates/](templates) by `{COMMAND}`; do not edit."
ABOUT_DATA = """H100 is an NVIDIA H100 80GB HBM3, H200 an NVIDIA H200. Each file in [data/](data)
    says config, commit, versions, hardware and seed."""
SEEDS = "n is the number of seeds; mean ± one sample standard deviation."


def filled_in(template: str, **fields: object) -> str:
    """Return the text of a template with its fields filled in and its prose wrapped.

    template: the name of a file in results/templates. Besides `fields`, it may name head,
    about_data and seeds.
    """
    text = (TEMPLATES / template).read_text()
    fields |= dict(head=HEAD, about_data=ABOUT_DATA, seeds=SEEDS)
    return joined(*text.format(**fields).split("\n\n"))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows, which are cells by column, as a Markdown table."""
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def grid(names: Sequence[str], column: str, cells: Mapping[tuple, str]) -> str:
    """Return cells as a Markdown table.

    A key is the first cells of its row, and then the column. names: the titles of the first cells.
    column: the format of the other titles, such as "batch {}". What has no cell is empty.
    """
    columns = sorted({key[-1] for key in cells})
    rows = dict.fromkeys(key[:-1] for key in cells)
    texts = [[*row, *(cells.get((*row, each), "") for each in columns)] for row in rows]
    return markdown_table([*names, *map(column.format, columns)], texts)


def joined(*parts: str) -> str:
    """Return the parts of a page with blank lines between, prose wrapped."""
    found = filter(None, map(str.strip, parts))
    return "\n\n".join(part if is_laid_out(part) else filled(part) for part in found) + "\n"


def filled(text: str) -> str:
    """Return prose on lines of at most 100 columns."""
    words = " ".join(text.split())
    return textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)


def is_laid_out(part: str) -> bool:
    """Return whether line breaks matter: a heading, table, picture, HTML or code."""
    return part.startswith(("#", "|", "!", "<", "```"))


def commands(text: str, *lines: str) -> str:
    """Return a block of a text and commands that a reader opens."""
    return details("Commands" if len(lines) > 1 else "Command", (text, lines))


def details(summary: str, *groups: tuple[str, Sequence[str]]) -> str:
    """Return such a <details> block: for each group a text, and commands in a code fence."""
    parts = [f"<details>\n<summary>{summary}</summary>"]
    for text, lines in groups:
        parts.append(f"{filled(text)}\n\n{fence(*lines)}")
    return "\n\n".join([*parts, "</details>"])


def fence(*lines: str) -> str:
    """Return commands in a code fence."""
    return "\n".join(["```bash", *map(wrapped_command, lines), "```"])


def wrapped_command(command: str) -> str:
    """Return a shell command on lines of at most 96 columns, broken before flags.

    A flag that is longer is broken before its value.
    """
    first, *flags = " ".join(command.split()).split(" --")
    flags = [flag if len(flag) < 92 else flag.replace(" ", " \\\n    ") for flag in flags]
    lines = [first]
    for flag in flags:
        if len(lines[-1]) + len(flag) < 87:
            lines[-1] += f" --{flag}"
        else:
            lines.append(f"--{flag}")
    return " \\\n    ".join(lines)
