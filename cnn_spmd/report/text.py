"""Hold the blocks of a report, numbers as text, and write blocks as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Heading(NamedTuple):
    """A heading; level 1 is the title of the report."""

    level: int
    text: str


class Paragraph(NamedTuple):
    """One paragraph of plain text."""

    text: str


class Table(NamedTuple):
    """A table; a header of empty cells is a list of facts, name and value."""

    header: list[str]
    rows: list[list[str]]


def table_of(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return a table of cells by column, without the columns in which every cell is empty."""
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    return Table(header, [[row[name] for name in header] for row in rows])


class Commands(NamedTuple):
    """Lines for a shell, one command per line."""

    lines: list[str]


class Chart(NamedTuple):
    """Pictures under one title and caption; each picture is an HTML element."""

    title: str
    pictures: list[str]
    caption: str


Block = Heading | Paragraph | Table | Commands | Chart


def mean_and_deviation(numbers: Sequence[float], digits: int) -> str:
    """Return mean ± sample standard deviation; "" for no numbers."""
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):,.{digits}f}"
    return mean + (f" ± {statistics.stdev(numbers):,.{digits}f}" if len(numbers) > 1 else "")


def optional(value: float | None, digits: int, factor: float = 1.0) -> str:
    """Return factor * value as text; "" for None."""
    return "" if value is None else f"{factor * value:,.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; white space in a cell becomes single blanks."""

    def line(cells: Sequence[str]) -> str:
        escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def as_markdown(blocks: Sequence[Block]) -> str:
    """Return the blocks as Markdown; charts are in report.html only."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Table(header, rows):
                parts.append(markdown_table(header, rows))
            case Commands(lines):
                parts.append("\n".join(["```bash", *lines, "```"]))
    return "\n\n".join([*parts, "The charts are in [report.html](report.html).\n"])
