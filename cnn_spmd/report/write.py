"""Write report.md, report.csv and report.html."""

import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.report import document, load, page, text
from cnn_spmd.training import runfiles


def write_report(folders: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Write report.md, report.csv and report.html on all `folders` into the first.

    Prints on stderr which runs are unfinished and which files are damaged. Returns the paths of
    the three files. Raises UserError for bad input, and for a folder that cannot be written.
    """
    notes: list[str] = []
    sweeps = load.load_sweeps(folders, notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    blocks = document.report_blocks(sweeps, notes)
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
