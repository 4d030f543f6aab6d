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
    widest cells before the numbers are folded.
    """
    made = table.Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="")
    for column, name in enumerate(header):
        is_number = column >= len(header) - numbers
        made.add_column(
            name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number
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


def fitting(
    columns: Sequence[Sequence[str]], kept: Sequence[Sequence[str]], width: int
) -> list[Sequence[str]]:
    """Return the columns (header and cells) for which `width` has room beside the kept ones.

    Those that come first are taken first. As the cells of kept columns can be folded, each counts
    as FOLDED characters at most.
    """
    room = width - sum(GAP + min(max(map(len, column)), FOLDED) for column in kept)
    taken = []
    for column in columns:
        needed = GAP + max(map(len, column))
        if needed <= room:
            room -= needed
            taken.append(column)
    return taken


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted name; the whole where two would be equal."""
    fields = list(fields)
    last = [field.rpartition(".")[2] for field in fields]
    return {
        field: name if last.count(name) == 1 else field
        for field, name in zip(fields, last, strict=True)
    }
