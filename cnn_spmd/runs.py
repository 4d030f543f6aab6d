"""List the runs below folders: `python -m cnn_spmd.runs FOLDER...`.

The table says of each run how it ended, in what it differs from the others, its best accuracy and
its size on disk. Runs of one data set stand together, the most accurate first. `--csv FILE` writes
every field of every run, as load_runs returns it.
"""

import argparse
import csv
import pathlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TextIO

from cnn_spmd import plain_table
from cnn_spmd.config import MESH_AXES, own_name
from cnn_spmd.errors import UserError
from cnn_spmd.report import compare, flat_runs, load
from cnn_spmd.training import environment

# The first columns of the CSV; every other field of a run follows.
FIRST = (
    "folder status reason experiment model dataset parallelism mesh.data mesh.model batch_size "
    "config.optimizer.learning_rate epochs steps seed best.accuracy best.step eval.accuracy "
    "images_per_second train_seconds bytes_on_disk commit started"
)

# The fields that say what is trained on what, and how: the first columns of the table.
SUBJECT = "model.name data.name optimizer.learning_rate batch_size data_digest experiment"


def parser() -> environment.Parser:
    """Return the parser of the command line."""
    made = environment.Parser(
        "runs",
        "List the runs below folders: status, what differs, the best accuracy over all "
        "evaluations, and megabytes on disk. Runs of one data set stand together, the most "
        "accurate first.",
    )
    made.add_argument(
        "folders",
        nargs="*",
        type=pathlib.Path,
        default=[pathlib.Path("runs")],
        metavar="FOLDER",
        help="of a run, a sweep, or of many; default: runs",
    )
    made.add_argument(
        "--csv",
        metavar="FILE",
        help="write every field of every run to this file instead, - is stdout: learning rate, "
        "epochs, accuracy, commit, start and the rest",
    )
    return made


def write_csv(runs: Sequence[dict], file: TextIO) -> None:
    """Write the names of all fields, and the values of each run."""
    found = dict.fromkeys(name for run in runs for name in run)
    first = [name for name in FIRST.split() if name in found]
    names = list(dict.fromkeys([*first, *found]))
    writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)


def load_all(folders: Sequence[pathlib.Path]) -> list[dict]:
    """Return the runs of load_runs in all folders, each once.

    With several folders, `folder` begins with theirs, and what holds no run is a warning. Raises
    UserError for a folder that does not exist, and where there is no run.
    """
    if len(folders) == 1:
        return flat_runs.load_runs(folders[0])
    found = {}
    for folder in folders:
        try:
            loaded = flat_runs.load_runs(folder)
        except UserError as error:
            if not folder.exists():
                raise
            print(f"warning: {error}", file=sys.stderr)
            continue
        for run in loaded:
            path = folder / run["folder"]
            found.setdefault(path.resolve(), run | dict(folder=str(path)))
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: hold no run")
    return list(found.values())


def as_table(
    folders: Sequence[pathlib.Path], runs: Sequence[dict], width: int | None
) -> Iterator[str]:
    """Yield the table of runs (load_all), at most `width` characters wide.

    Runs of one data set stand together, the most accurate first. width: None where there is no
    terminal. Each run then has one line, with its whole name.
    """
    runs = sorted(runs, key=lambda run: (data_of(run), -run.get("best.accuracy", -1.0)))
    compared = [compared_fields(run) for run in runs]
    differ = differing(compared)
    names = [folders[0].resolve().name if run["folder"] == "." else run["folder"] for run in runs]
    kept = [{"data.validation": run.get("config.data.validation")} for run in runs]
    splits = [compare.split_of([each]) for each in kept]
    accuracies = [f"{run['best.accuracy']:.2%}" if "best.accuracy" in run else "" for run in runs]
    longest = max(map(len, names))
    room = longest if width is None else min(longest, width // 3)
    first = ["run", *(folded(name, room) for name in names)]
    width = width or room + plain_table.WIDTH
    last = [
        ["status", *(run["status"] for run in runs)],
        *([["split", *splits]] if len({*splits}) > 1 else []),
        ["accuracy", *accuracies],
        ["MB", *(f"{run['bytes_on_disk'] / 1e6:.1f}" for run in runs)],
    ]
    short = plain_table.short_names(differ) | {"model.name": "model", "data.name": "data"}
    columns = {
        field: [short[field], *(compare.value_text(own.get(field, "")) for own in compared)]
        for field in differ
    }
    shown = plain_table.fitting([*columns.values()], last, width - room - plain_table.GAP)
    header, *rows = zip(first, *shown, *last, strict=True)
    both = " or ".join(sorted({*splits}))
    where = ", ".join(map(str, folders))
    count = f"{len(runs)} run" + "s" * (len(runs) != 1)
    title = f"{count} in {where}; accuracy: the best on the {both} split"
    yield from plain_table.aligned(title, header, rows, numbers=2, width=width)
    if hidden := [field for field, column in columns.items() if column not in shown]:
        said = f"They also differ in {', '.join(hidden)}: see --csv."
        yield from textwrap.wrap(said, width, break_long_words=False, break_on_hyphens=False)
    for run, name in zip(runs, names, strict=True):
        if "reason" in run:
            yield f"{name} is {run['status']}: {run['reason']}"


def folded(name: str, room: int) -> str:
    """Return a run's name in lines of at most `room` characters, broken after "/" or ",".

    A part that is longer than that is cut.
    """
    lines = [""]
    for part in re.findall(r"[^/,]*[/,]?", name):
        if len(lines[-1] + part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(textwrap.fill(line, room) for line in lines if line)


def data_of(run: dict) -> str:
    """Return the name of a run's data set, as reports have it (config.own_name)."""
    kind = run.get("config.data.name", "")
    return own_name(kind, run.get("config.data.dir", ""), run.get("dataset") or kind)


def differing(compared: Sequence[dict]) -> list[str]:
    """Return the fields in which runs differ, the most important first.

    SUBJECT comes first, then the fields with the most values, and last the fields that change at
    most the speed. A run that lacks a field does not differ in it. The digest of the data counts
    where data sets of one name differ in it.
    """
    values: dict[str, set[str]] = {}
    for own in compared:
        for field, value in own.items():
            values.setdefault(field, set()).add(str(value))
    data = {(own["data.name"], own["data_digest"]) for own in compared if "data_digest" in own}
    if len(data) == len({name for name, _ in data}):  # the name says which data it is
        values.pop("data_digest", None)

    first = SUBJECT.split()

    def place(field: str) -> tuple:
        last = field != "seed" and field.startswith(compare.NOT_THE_RECIPE)
        subject = first.index(field) if field in first else len(first)
        return last, subject, -len(values[field])

    return sorted((field for field in values if len(values[field]) > 1), key=place)


def compared_fields(run: dict) -> dict:
    """Return the fields of a run that may make a difference: mesh, config, device and data."""
    prefix = "config."
    config = {
        name.removeprefix(prefix): value for name, value in run.items() if name.startswith(prefix)
    }
    mesh = load.mesh_of_run({axis: run.get(f"mesh.{axis}") for axis in MESH_AXES}, config)
    own = load.compared_fields(config, run) | {"data.name": data_of(run)}
    if "data_digest" in own:
        own["data_digest"] = own["data_digest"][:8]  # as the names of one's own data have it
    return own if mesh is None else dict(mesh=mesh) | own


def print_runs(arguments: argparse.Namespace) -> None:
    """Print the table of the runs, or write their CSV."""
    runs = load_all(arguments.folders)
    if arguments.csv == "-":
        write_csv(runs, sys.stdout)
    elif arguments.csv:
        try:
            with pathlib.Path(arguments.csv).open("w", newline="", encoding="utf-8") as file:
                write_csv(runs, file)
        except OSError as error:
            raise UserError(
                f"--csv={arguments.csv}: cannot be written: {error.strerror}: give another file"
            ) from None
        print(f"{len(runs)} runs: {arguments.csv}")
    else:
        width = shutil.get_terminal_size((0, 0)).columns or None
        print(*as_table(arguments.folders, runs, width), sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; 2: bad input, 130: Ctrl-C."""
    return environment.exit_code_of(lambda: print_runs(parser().parse_args(argv)))


if __name__ == "__main__":
    environment.protect_streams()
    sys.exit(main())
