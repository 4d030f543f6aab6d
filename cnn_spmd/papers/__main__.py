"""Print published figures beside measured ones.

`python -m cnn_spmd.papers` prints the pages of results/, and `--write` writes them.
`python -m cnn_spmd.papers RUN...` prints the figures that your runs are about; with
`--beside 11pct`, their test errors beside that figure.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.papers import beside, pages, summaries
from cnn_spmd.training import environment


def parser() -> environment.Parser:
    """Return the parser of the command line."""
    made = environment.Parser(
        "papers",
        "Print the pages of results/, made from results/data: every published figure beside "
        "what was measured, accuracy by depth, errors by batch size, speeds. With RUN: print "
        "the published figures that these runs are about, beside what they measured.",
    )
    made.add_argument(
        "runs",
        nargs="*",
        type=pathlib.Path,
        metavar="RUN",
        help="the folder of a run or of a sweep, or a summary.json",
    )
    made.add_argument(
        "--beside",
        default="",
        metavar="NAME",
        help="show the test errors of RUN, of any network, beside a published one, such as 11pct",
    )
    made.add_argument(
        "--write",
        action="store_true",
        help="write the pages, their pictures and README's headline table instead",
    )
    made.add_argument(
        "--depth_plot", type=pathlib.Path, metavar="FILE.svg", help="also draw accuracy by depth"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code, as environment.exit_code_of."""
    return environment.exit_code_of(lambda: print_or_write(parser().parse_args(argv)))


def print_or_write(arguments: argparse.Namespace) -> None:
    """Do what the arguments say. Raises UserError for bad input."""
    if arguments.runs and (arguments.write or arguments.depth_plot):
        raise UserError("RUN: expected neither --write nor --depth_plot with it")
    if arguments.beside and not arguments.runs:
        raise UserError("--beside: expected a RUN with it")
    if arguments.depth_plot:
        draw_depth(arguments.depth_plot)
    if arguments.runs:
        print(beside.runs_page(arguments.runs, arguments.beside), end="")
    elif arguments.write:
        print(*pages.write_pages(), sep="\n")
    else:
        pages.print_pages()


def draw_depth(path: pathlib.Path) -> None:
    """Draw accuracy by depth. Raises UserError where the file cannot be written."""
    from cnn_spmd.papers import pictures  # loads matplotlib, which the pages do not need

    runs = summaries.load_single_runs()
    try:
        path.write_text(pictures.accuracy_by_depth(runs))
    except OSError as error:
        raise UserError(f"--depth_plot={path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    environment.protect_streams()
    sys.exit(main())
