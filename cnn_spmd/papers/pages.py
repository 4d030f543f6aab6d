"""Make the pages of results/ from results/data.

`python -m cnn_spmd.papers --write` writes them; a test holds that they are up to date. A page is
made by the module of its name; papers.md by beside.py. The text of a page is its template in
results/templates (layout.py).

results/data/rates/*.json have the summaries of runs by which learning rates were chosen;
programs/, speed/, predictions/, startup/ and streaming/ what the scripts in benchmarks/ wrote. All
other files are runs and sweeps (measured.py).
"""

import pathlib
from collections.abc import Callable

from cnn_spmd.errors import UserError
from cnn_spmd.papers import (
    batches,
    beside,
    cifar10,
    depth,
    headline,
    large_batches,
    meshes,
    predictions,
    programs,
    pytorch,
    rates,
    startup,
    summaries,
)
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.training import runfiles

RESULTS = DATA.parent
# File in results/ -> the function that makes it.
PAGES: dict[str, Callable[[], str]] = {
    "cifar10.md": cifar10.page,
    "papers.md": beside.page,
    "depth.md": depth.page,
    "batches.md": batches.page,
    "rates.md": rates.page,
    "meshes.md": meshes.page,
    "pytorch.md": pytorch.page,
    "programs.md": programs.page,
    "startup.md": startup.page,
    "predictions.md": predictions.page,
}


def print_pages() -> None:
    """Print all pages. Raises UserError where there are no results."""
    require_results()
    print(*(make() for make in PAGES.values()), sep="\n")


def write_pages() -> list[pathlib.Path]:
    """Write all pages, their pictures and README's headline table.

    Returns the files that changed. Raises UserError where there are no results.
    """
    from cnn_spmd.papers import pictures  # loads matplotlib, which the pages do not need

    require_results()
    readme = RESULTS.parent / "README.md"
    texts = {RESULTS / name: make() for name, make in PAGES.items()}
    runs = summaries.load_single_runs()
    texts[RESULTS / "depth.svg"] = pictures.accuracy_by_depth(runs)
    texts[RESULTS / predictions.DEVICES] = pictures.speed_by_devices(
        predictions.load_predictions("devices")
    )
    if large_batches.errors_of(runs):
        texts[RESULTS / large_batches.PICTURE] = pictures.error_by_batch(runs)
    texts[readme] = headline.with_headline(readme.read_text())
    changed = [
        path for path, text in texts.items() if not path.exists() or path.read_text() != text
    ]
    for path in changed:
        with runfiles.atomic_write(path) as temporary:
            temporary.write_text(texts[path])
    return changed


def require_results() -> None:
    """Raise UserError where results/data is missing, as in an installed copy."""
    if not DATA.is_dir():
        raise UserError(f"{DATA}: does not exist: use a checkout, or give the folders of runs")
