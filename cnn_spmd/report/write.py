"""Write report.md, report.csv and report.html."""

import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.report import best_runs, load, page, run_csv, settings, text
from cnn_spmd.training import runfiles

# Stands at the top of each file of a report. A file without it is somebody's own.
MARKS = {"report.md": "# cnn_spmd", "report.csv": "folder,name,", "report.html": "<title>cnn_spmd"}


def write_report(
    folders: Sequence[pathlib.Path], target_error: float | None = None
) -> list[pathlib.Path]:
    """Write report.md, report.csv and report.html on all `folders` into the first with a run.

    target_error: the error to which steps and seconds are counted; None: chosen from the runs
    (batch_scaling.measure, settings.target_accuracy). A file of another origin that has one of the
    names is kept as NAME.old. Prints the best setting of each sweep, and of all on each data set,
    and on how many runs the report is. Prints on stderr which runs are unfinished and which files
    are damaged.
    Returns the paths of the three files. Raises UserError for bad input, for a folder that cannot
    be written, and for a target where no run was evaluated.
    """
    notes: list[str] = []
    # `runs/*` also names what an earlier report wrote there.
    if files := [path for path in folders if path.is_file()]:
        folders = [path for path in folders if path not in files] or folders
        notes += [f"{path}: is left out, as it is a file" for path in files]
    sweeps = load.load_sweeps(folders, notes)
    home = next(filter(load.sweeps_and_runs, folders))
    if target_error is not None:
        check_target(target_error, [run for sweep in sweeps for run in sweep["runs"]], notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    from cnn_spmd.report import document  # loads matplotlib, which load_runs does not need

    blocks = document.report_blocks(sweeps, notes, target_error)
    contents = {
        "report.md": text.as_markdown(blocks),
        "report.csv": run_csv.as_csv(sweeps),
        "report.html": page.as_html(blocks),
    }
    for name, content in contents.items():
        try:
            runfiles.set_foreign_aside(home / name, MARKS[name])
            with runfiles.atomic_write(home / name) as temporary:
                # The names of folders need not be valid UTF-8.
                temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"{home / name}: cannot be written: {error.strerror}") from error
    lines = []
    for sweep in sweeps:
        if said := best_runs.answer(settings.overview(sweep, target_error)):
            lines.append(f"{sweep['title']}: {said}" if len(sweeps) > 1 else said)
    for data, found in best_runs.given_by_data(sweeps).items():
        lines.append(best_runs.best_given(data, found))
    if "±" in "".join(lines):
        lines.append(best_runs.DEVIATION)
    if len(folders) > 1:
        count = sum(len(sweep["runs"]) for sweep in sweeps)
        lines.append(f"One report on {count} run{'s' * (count != 1)}, in {home}:")
    for line in lines:
        print(line)
    return [home / name for name in contents]


def check_target(target_error: float, runs: Sequence[dict], notes: list[str]) -> None:
    """Raise UserError for a target that no run can have; note where the seconds are unknown."""
    if not any(map(settings.is_evaluated, runs)):
        raise UserError(
            f"--target_error={target_error:g}: expected runs that were evaluated, on a data set "
            "that is not synthetic"
        )
    if not any(map(settings.timed_evaluations, runs)):
        notes.append(
            f"--target_error={target_error:g}: no run has two evaluations with their seconds "
            "(eval.every_epochs), so no column has the seconds to it"
        )
