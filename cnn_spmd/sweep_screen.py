"""Show a sweep: what runs, how long it still takes, and a table of what differs.

A row is an entry of sweep.json: number, mesh, settings (the swept fields), status, reason, seconds
and figures (runfiles.figures_of).
"""

import json
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence

from rich import console, live, text

from cnn_spmd import plain_table
from cnn_spmd.analysis import program
from cnn_spmd.data.progress import clock_text
from cnn_spmd.training import runfiles

PLAIN_SECONDS = 60.0  # between two lines on a run's step where there is no terminal
TAIL_BYTES = 4096  # of metrics.jsonl; a line has a few hundred
# Lines of a terminal that a live table leaves to its title, its header and the cursor.
OTHER_LINES = 4


# ---- What differs


def differing(rows: Sequence[dict]) -> dict[str, str]:
    """Return the swept fields in which rows differ, with the short name of each.

    For a single row, these are all its swept fields.
    """
    fields = dict.fromkeys(field for row in rows for field in swept(row))
    values = {field: {str(swept(row).get(field)) for row in rows} for field in fields}
    return plain_table.short_names(
        field for field in fields if len(rows) == 1 or len(values[field]) > 1
    )


def swept(row: dict) -> dict:
    """Return the mesh and the settings of a row, as one dict without what is null."""
    mesh = {} if row["mesh"] is None else dict(mesh=row["mesh"])
    return mesh | row["settings"]


def named(row: dict, fields: dict[str, str]) -> str:
    """Return "mesh=4x2 learning_rate=0.1" for a row. fields: as of `differing`."""
    own = swept(row)
    return " ".join(f"{name}={own[field]}" for field, name in fields.items() if field in own)


def runs_text(count: int) -> str:
    """Return "1 run" or "2 runs"."""
    return f"{count} run{'s' * (count != 1)}"


# ---- Tables


def table_of(
    rows: Sequence[dict],
    fields: dict[str, str],
    title: str,
    figures: dict[str, list[str]],
    width: int,
) -> Iterator[str]:
    """Yield the table of a sweep: numbers, what differs, status, and the figures that fit.

    fields: as of `differing`. figures: the cells of each column, the most important column first.
    """
    kept = [["run", *(str(row["number"]) for row in rows)]]
    for field, name in fields.items():
        kept.append([name, *(str(swept(row).get(field, "")) for row in rows)])
    kept.append(["status", *(row["status"] for row in rows)])
    known = [[name, *cells] for name, cells in figures.items() if any(cells)]
    shown = plain_table.fitting(known, kept, width)
    header, *lines = zip(*kept, *shown, strict=True)
    yield from plain_table.aligned(title, header, lines, len(shown), width=width)


def figure_columns(rows: Sequence[dict]) -> dict[str, list[str]]:
    """Return the cells of each column of figures, the most important column first.

    A metric of the user's own follows the accuracy, so that a narrow terminal has room for it.
    """
    metrics = {}
    for name in runfiles.registered_metrics(row["figures"] for row in rows):
        values = [(row["figures"].get("eval") or {}).get(name) for row in rows]
        form = "{:.2%}" if name in runfiles.SHARES else "{:.4g}"
        metrics[name] = [_cell(value, form) for value in values]
    columns = {
        "accuracy": [_cell(row["figures"].get("accuracy"), "{:.2%}") for row in rows],
        **{name: cells for name, cells in metrics.items() if name not in runfiles.SHARES},
        "images/s": [_cell(row["figures"].get("images_per_second"), "{:,.0f}") for row in rows],
        "seconds": [_cell(row["seconds"], "{:.0f}") for row in rows],
    }
    # None where there is no report on the program.
    ring = [row["figures"].get("ring_bytes") for row in rows]
    if len({size for size in ring if size is not None}) > 1:  # not what all runs share
        columns["ring MB"] = [_cell(size, "{:.1f}", 1e-6) for size in ring]
    # None where a resumed run had no step left.
    times = [(row["figures"].get("step_milliseconds") or {}).get("median") for row in rows]
    columns["step ms"] = [_cell(milliseconds, "{:.2f}") for milliseconds in times]
    return columns | metrics


def _cell(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else form.format(factor * value)


def reasons(rows: Sequence[dict]) -> Iterator[str]:
    """Yield each reason why runs are not completed, once, with the numbers of these runs."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            found.setdefault((row["status"], row["reason"]), []).append(str(row["number"]))
    for (status, reason), numbers in found.items():
        yield f"Run{'s' * (len(numbers) > 1)} {', '.join(numbers)} {status}: {reason}"


# ---- While it runs


class Screen:
    """Show a sweep in progress; at the end its table, and why runs are not completed.

    Why runs are refused stands before the first run, too.

    On a terminal this is a live table, otherwise plain lines. rows: all of the sweep. to_do: those
    that are to run.
    """

    def __init__(self, rows: Sequence[dict], to_do: Sequence[dict]):
        self.rows, self._to_do = rows, to_do
        self._fields = differing(rows)
        # Values may hold brackets and colons.
        self._console = console.Console(markup=False, emoji=False, highlight=False)
        self._live = None
        if sys.stdout.isatty():
            self._live = live.Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Screen":
        statuses = [row["status"] for row in self.rows]
        counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
        parts = ", ".join(f"{count} {status}" for status, count in counts.items())
        refused = [row for row in self.rows if row["status"] == "refused"]
        early = reasons(refused) if self._to_do else ()  # otherwise the table follows at once
        print(f"A sweep of {runs_text(len(self.rows))}: {parts}", *early, sep="\n", flush=True)
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()
        lines = self._table(self.rows, f"The sweep of {runs_text(len(self.rows))}")
        print(*lines, *reasons(self.rows), sep="\n", flush=True)

    def begin(self, row: dict, folder: pathlib.Path) -> None:
        """Show that a row's run begins in `folder`."""
        self._row, self._folder = row, folder
        self._since, self._began = time.monotonic(), time.time()
        self._next_line = self._since + PLAIN_SECONDS
        self._done = self._to_do.index(row)
        if self._live:
            self.tick()
        else:
            print(f"{self._state(None)}  {named(row, self._fields)}", flush=True)

    def tick(self) -> None:
        """Show the step that the run has reached; called every second or so."""
        if self._live:
            title = self._state(step_of(self._folder, self._began))
            lines = self._table(self._window(), title)
            self._live.update(text.Text("\n".join(lines)), refresh=True)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            print(self._state(step_of(self._folder, self._began)), flush=True)

    def end(self) -> None:
        """Show how the run ended."""
        if self._live:
            return  # the next run, or the end, shows it
        cells = {name: column for name, (column,) in figure_columns([self._row]).items() if column}
        figures = ", ".join(f"{name} {cell}" for name, cell in cells.items())
        print(f"  {self._row['status']}{': ' * bool(figures)}{figures}", flush=True)

    def _table(self, rows: Sequence[dict], title: str) -> Iterator[str]:
        return table_of(rows, self._fields, title, figure_columns(rows), self._console.width)

    def _state(self, steps: tuple[int, int] | None) -> str:
        """Say where the sweep is: "3 of 8: run 5, step 10 of 90, ETA of the sweep 1:02:03"."""
        parts = [f"{self._done + 1} of {len(self._to_do)}: run {self._row['number']}"]
        if steps:
            parts.append("step {} of {}".format(*steps))
        seconds = self._seconds_left(steps)
        if seconds is not None:
            parts.append(f"ETA of the sweep {clock_text(seconds)}")
        return ", ".join(parts)

    def _seconds_left(self, steps: tuple[int, int] | None) -> float | None:
        """Estimate how long the sweep still takes; None as long as nobody knows.

        A run that has not begun takes as long as those that are completed took, or as this one.
        """
        elapsed = time.monotonic() - self._since
        took = [row["seconds"] for row in self.rows if row["status"] == "completed"]
        whole = elapsed * steps[1] / steps[0] if steps else None
        usual = statistics.mean(took) if took else whole
        if usual is None:
            return None
        left = max((usual if whole is None else whole) - elapsed, 0)
        return left + usual * (len(self._to_do) - self._done - 1)

    def _window(self) -> Sequence[dict]:
        """Return the rows that the terminal has room for, with the running one."""
        room = max(self._console.height - OTHER_LINES, 1)
        running = next(i for i, row in enumerate(self.rows) if row is self._row)
        first = max(min(running - room // 2, len(self.rows) - room), 0)
        return self.rows[first : first + room]


def step_of(folder: pathlib.Path, began: float) -> tuple[int, int] | None:
    """Return the step that a run has reached, and its last step; None before the first chunk.

    began: when the run began, as time.time(); what an earlier attempt wrote does not count.
    """
    path = folder / "metrics.jsonl"
    try:
        if path.stat().st_mtime < began:
            return None
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            *_, line, _ = file.read().split(b"\n")  # the last line may be cut
        return json.loads(line)["step"], runfiles.read_json(folder / "config.json")["steps"]
    except (OSError, KeyError, ValueError):  # not yet there, or just being written
        return None


# ---- A dry run


def show_dry_run(rows: Iterable[dict], count: int) -> list[dict]:
    """Print the table of a dry run of `count` rows, which are compiled meanwhile; return them."""
    page = console.Console(markup=False, emoji=False, highlight=False)
    done: list[dict] = []
    with page.status(f"compiling {runs_text(count)}") as status:  # shows nothing without a terminal
        for row in rows:
            done.append(row)
            status.update(f"compiled {len(done)} of {runs_text(count)}")
    title = (
        f"A dry run of {runs_text(count)}. MB per device: state between steps, held while it "
        "trains,\nsent per step in rings"
    )
    columns = report_columns(done)
    lines = [*table_of(done, differing(done), title, columns, page.width)]
    notes = []
    _, header, *_ = lines
    if "theory" in header.split():
        notes.append("theory MB: sent per step by the closed form.")
    if "ms" in header.split():
        notes.append("ms: the step as predicted.")
    if any("report" in row and program.sends_twice(row["report"]) for row in done):
        notes += textwrap.wrap(program.NO_REDUCE_SCATTER, page.width)
    print(*lines, *notes, *reasons(done), sep="\n")
    return done


def report_columns(rows: Sequence[dict]) -> dict[str, list[str]]:
    """Return the cells of a dry run's columns, in MB per device; refused rows have no `report`."""
    columns: dict[str, list[str]] = {}
    for row in rows:
        report = row.get("report")
        held = program.held_by_device(report) if report else None
        state = held and sum(held.values()) - held["images"] - held["temporary"]
        totals, prediction = (report or {}).get("totals"), (report or {}).get("prediction")
        for name, value, form, factor in (
            ("state MB", state, "{:,.1f}", 1e-6),
            ("held MB", held and sum(held.values()), "{:,.1f}", 1e-6),
            ("sent MB", totals and totals["ring_bytes"], "{:,.1f}", 1e-6),
            ("theory MB", report and report["closed_form_ring_bytes"], "{:,.1f}", 1e-6),
            ("ms", prediction and prediction["predicted_milliseconds"], "{:.3f}", 1),
            ("collectives", totals and totals["count"], "{}", 1),
        ):
            columns.setdefault(name, []).append(_cell(value, form, factor))
    return columns
