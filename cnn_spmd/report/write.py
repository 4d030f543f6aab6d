"""Write report.md, report.csv and report.html."""

import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.report import batch_scaling, document, load, page, text
from cnn_spmd.training import runfiles


def write_report(
    folders: Sequence[pathlib.Path], target_error: float | None = None
) -> list[pathlib.Path]:
    """Write report.md, report.csv and report.html on all `folders` into the first.

    target_error: as batch_scaling.measure takes it. Prints on stderr which runs are unfinished and
    which files are damaged. Returns the paths of the three files. Raises UserError for bad input,
    for a folder that cannot be written, and for a target without a sweep of batch_size.
    """
    notes: list[str] = []
    sweeps = load.load_sweeps(folders, notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if target_error is not None and not any(map(batch_scaling.measure, sweeps)):
        raise UserError(
            f"--target_error={target_error:g}: expected a sweep of batch_size, of which at least "
            f"{batch_scaling.LEAST} sizes of one network on one data set (not synthetic) were "
            "evaluated"
        )
    blocks = document.report_blocks(sweeps, notes, target_error)
    contents = {
        "report.md": text.as_markdown(blocks),
        "report.csv": text.as_csv(sweeps),
        "report.html": page.as_html(blocks),
    }
    for name, content in contents.items():
        try:
            with runfiles.atomic_write(folders[0] / name) as temporary:
                # The names of folders need not be valid UTF-8.
                temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"{folders[0] / name}: cannot be written: {error.strerror}") from error
    return [folders[0] / name for name in contents]
