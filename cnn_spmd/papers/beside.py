"""Make results/papers.md, and the same tables of your own runs."""

import pathlib
from collections.abc import Sequence

from cnn_spmd.papers import measured, summaries
from cnn_spmd.papers.layout import HEAD, SEEDS, about_data, details, joined
from cnn_spmd.papers.measured import MeasuredRow
from cnn_spmd.report.text import markdown_table

# Title of a table of figures -> what to know about it.
PAPER_NOTES = {
    "cuda-convnet's CIFAR-10 networks": (
        """Error is on the 10,000 test images, in float32. Seconds on other hardware say only how
        long the recipe takes today."""
    ),
    "Claims of AlexNet 2012, on CIFAR-10": (
        """Each row compares runs with control runs of the same seed: (error - control's error), or
        (epochs / control's epochs). These seeds show that ReLU is faster than tanh, by less
        than claimed, and that conv2 is worth about three points. They cannot distinguish from
        chance what overlapping pools, response norms, dropout, conv3, conv4 and the second tower
        are worth. Two of 11pct's pairs ran on one kind of card, so n is 2 there."""
    ),
    "AlexNet 2012 on ImageNet": "",
    "Residual and plain networks": "Error is on the 10,000 test images.",
    "Large batches": (
        """Each row compares runs with runs of batch 128 and the same seed: (error - error at 128).
        Published is for ImageNet, relative to a batch of 256 or more, so there is no
        difference."""
    ),
    "One weird trick": (
        """Batches are (convolutions, dense layers). Speedups are measured on random images; their
        n counts sweeps, whose learning rates and warm-ups differ, which no speed depends on."""
    ),
    "Speedup over one GPU": (
        """Each GPU has the same batch; random images. Speedups are relative to one GPU of the same
        kind."""
    ),
}


def page() -> str:
    """Return the page with every published figure that this repository can measure."""
    parts = [
        "# Beside the papers",
        HEAD,
        f"""Every published figure that an experiment of this repository is set up to measure.
        Difference is measured minus published. {SEEDS} {about_data()}""",
    ]
    for title, rows in measured.measured_tables().items():
        parts += [f"## {title}", PAPER_NOTES[title], *figures_beside(rows)]
    return joined(*parts)


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
        parts += [f"## {title}", *figures_beside(rows)]
    for reason, folders in others.items():
        parts.append(f"About no published figure ({reason}): {'; '.join(map(str, folders))}.")
    if unfinished:
        parts.append(f"Not completed, so left out: {'; '.join(unfinished)}.")
    return joined(*parts)


def figures_beside(rows: Sequence[MeasuredRow]) -> list[str]:
    """Return the table of some figures, and their commands and sources."""
    numbered = [(str(number), *row[:6]) for number, row in enumerate(rows, 1)]
    header = ["#", "figure", "published", "measured", "n", "difference", "hardware"]
    closed = details("Commands and sources", *command_groups(rows))
    return [markdown_table(header, numbered), closed]


def command_groups(rows: Sequence[MeasuredRow]) -> list[tuple[str, list[str]]]:
    """Return text and commands for the rows that share a command and a source."""
    groups: dict[tuple[str, str], list[str]] = {}
    for number, row in enumerate(rows, 1):
        groups.setdefault((row.command, row.source), []).append(str(number))
    return [
        (f"Row {', '.join(numbers)}: {source}.", command.split("; "))
        for (command, source), numbers in groups.items()
    ]
