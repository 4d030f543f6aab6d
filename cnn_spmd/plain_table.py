"""Lay out tables as plain text, for terminals, files and logs.

This module imports neither jax nor TensorFlow Datasets, so that reading runs is quick.
"""

import io
from collections.abc import Iterable, Iterator, Sequence

from rich import console, table

WIDTH = 100
GAP = 2  # blanks before the first column and between two
FOLDED = 20  # characters that are left to a text column before others give way


def aligned(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: int = 1,
    total: Sequence[str] = (),
    width: int = WIDTH,
) -> Iterator[str]:
    """Yield a title and aligned rows of at most `width` characters.

    The last `numbers` columns are right-aligned. total: a last row. Where a table is too wide, the
    cells between the first column and the numbers are folded.
    """
    made = table.Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="")
    for column, name in enumerate(header):
        is_number = column >= len(header) - numbers
        made.add_column(
            name,
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_number or not column,
        )
    for row in (*rows, total) if total else rows:
        made.add_row(*row)
    # Values may hold brackets and colons, which rich would take for markup and emoji.
    page = console.Console(
        file=io.StringIO(), width=width - GAP, color_system=None, markup=False, emoji=False
    )
    page.print(made, highlight=False)
    yield title
    for line in page.file.getvalue().splitlines():
        yield (" " * GAP + line).rstrip()


def fitting(columns: Sequence[Sequence[str]], keep: int, width: int) -> int:
    """Return how many columns (header and cells) fit into `width`.

    The first `keep` always stay. As their cells can be folded, each counts as FOLDED at most.
    """
    widths = [GAP + max(map(len, column)) for column in columns]
    widths[:keep] = [min(each, GAP + FOLDED) for each in widths[:keep]]
    count = len(columns)
    while count > keep and sum(widths[:count]) > width:
        count -= 1
    return count


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted name; the whole where two would be equal."""
    fields = list(fields)
    last = [field.rpartition(".")[2] for field in fields]
    return {
        field: name if last.count(name) == 1 else field
        for field, name in zip(fields, last, strict=True)
    }
