"""Write report.md, report.csv and report.html."""

import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.report import page
from cnn_spmd.report.load import load
from cnn_spmd.training import runfiles


def write(folders: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Writes report.md, report.csv and report.html on all `folders` into the first; returns their paths.

    Says on stderr what is unfinished or damaged. Raises UserError for bad input and for a folder that cannot be written.
    """
    notes: list[str] = []
    sweeps = load(folders, notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    blocks = page.document(sweeps, notes)
    texts = {
        "report.md": page.as_markdown(blocks),
        "report.csv": page.as_csv(sweeps),
        "report.html": page.as_html(blocks),
    }
    for name, text in texts.items():
        try:
            with runfiles.atomic_write(
                folders[0] / name
            ) as temporary:  # backslashreplace: names of folders
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"{folders[0] / name}: cannot be written: {error.strerror}") from error
    return [folders[0] / name for name in texts]
