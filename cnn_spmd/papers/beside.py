"""Make results/papers.md, and the same tables of your own runs."""

import pathlib
from collections.abc import Sequence

from cnn_spmd.papers import measured, summaries
from cnn_spmd.papers.layout import SEEDS, details, filled_in, joined, table
from cnn_spmd.papers.measured import MeasuredRow


def page() -> str:
    """Return the page with every published figure that this repository can measure."""
    tables = measured.measured_tables().items()
    return filled_in("papers.md", tables={title: figures_beside(rows) for title, rows in tables})


def runs_page(paths: Sequence[pathlib.Path], beside: str = "") -> str:
    """Return the page with the published figures that the runs in `paths` are about.

    beside: the published figure to show instead, as for measured.rows_beside.
    Raises UserError for a path without a run, and as measured.rows_beside.
    """
    runs, unfinished = summaries.load_given(paths)
    tables, others = measured.tables_about(runs), measured.folders_beside_nothing(runs)
    if beside:
        rows = measured.rows_beside(beside, runs)
        tables, others = {f"Beside {beside}": rows} if rows else {}, {}
    parts = []
    if tables:
        parts += [
            "# These runs beside the papers",
            f"""Difference is measured minus published. {SEEDS} A figure that is not measured
            needs all the runs of its commands.""",
        ]
    for title, rows in tables.items():
        parts += [f"## {title}", figures_beside(rows)]
    for reason, folders in others.items():
        parts.append(f"About no published figure ({reason}): {'; '.join(map(str, folders))}.")
    if unfinished:
        parts.append(f"Not completed, so left out: {'; '.join(unfinished)}.")
    return joined(*parts)


def figures_beside(rows: Sequence[MeasuredRow]) -> str:
    """Return the table of some figures, and their commands and sources."""
    columns = ("published", "measured", "n", "difference", "hardware")
    cells = []
    groups: dict[tuple[str, str], list[str]] = {}  # the rows that share a command and a source
    for number, row in enumerate(rows, 1):
        own = {column: getattr(row, column) for column in columns}
        cells.append({"#": str(number), "figure": row.name} | own)
        groups.setdefault((row.command, row.source), []).append(str(number))
    closed = details(
        "Commands and sources",
        *(
            (f"Row {', '.join(numbers)}: {source}.", command.split("; "))
            for (command, source), numbers in groups.items()
        ),
    )
    return f"{table(cells)}\n\n{closed}"
