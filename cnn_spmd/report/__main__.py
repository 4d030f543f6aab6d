"""Write reports on runs and sweeps: `python -m cnn_spmd.report RUN_OR_SWEEP...`.

report.md, report.csv and report.html go into the folder given. Of several folders, the first that
holds a run gets them.
`--pictures RUN` first draws what the run learned (pictures.py).
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd import experiment
from cnn_spmd.errors import UserError
from cnn_spmd.report.write import write_report
from cnn_spmd.training import environment


def parser() -> environment.Parser:
    """Return the parser of the command line."""
    made = environment.Parser(
        "report",
        "Write report.md, report.csv and report.html (tables and charts, no network needed) on "
        "runs and sweeps into the folder given. Of several folders, the first that holds a run "
        "gets them.",
    )
    made.add_argument(
        "folders",
        nargs="+",
        type=pathlib.Path,
        metavar="RUN_OR_SWEEP",
        help="a --workdir of launch.py, or a folder that holds some, such as runs",
    )
    made.add_argument(
        "--pictures",
        action="store_true",
        help="first draw what each RUN learned, from its newest checkpoint: the first layer's "
        "filters, test images with their most probable classes, nearest neighbours",
    )
    made.add_argument(
        "--data_dir", metavar="PATH", help="with --pictures: where the run's data.dir is now"
    )
    made.add_argument(
        "--config",
        metavar="E",
        help="with --pictures: the experiment, where the run needs what it adds",
    )
    made.add_argument(
        "--target_error",
        type=float,
        metavar="SHARE",
        help="the error of an evaluation, from 0 to 1, to which seconds of training are counted, "
        "and the steps of a sweep of batch_size; without it, what half of the settings reach, and "
        "what every batch size reaches, in whole percent",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; 2: bad input, 130: Ctrl-C."""
    return environment.exit_code_of(lambda: draw_and_write(parser().parse_args(argv)))


def refuse(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that cannot work."""
    for option in ("data_dir", "config"):
        if getattr(arguments, option) is not None and not arguments.pictures:
            raise UserError(f"--{option}: expected --pictures with it")
    target = arguments.target_error
    if target is not None and not 0 < target < 1:
        raise UserError(f"--target_error={target:g}: expected a share between 0 and 1, such as 0.1")


def draw_and_write(arguments: argparse.Namespace) -> None:
    """Draw the pictures that are asked for, and write a report on the folders given."""
    refuse(arguments)
    if arguments.pictures:
        from cnn_spmd.report import pictures  # imports jax, which a report does not need

        if arguments.config:
            experiment.load_file(arguments.config)
        for folder in arguments.folders:
            print(*pictures.draw_pictures(folder, arguments.data_dir), sep="\n")
    print(*write_report(arguments.folders, arguments.target_error), sep="\n")


if __name__ == "__main__":
    environment.protect_streams()
    sys.exit(main())
