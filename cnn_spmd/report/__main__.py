"""Reports from measured runs: `python -m cnn_spmd.report RUN_OR_SWEEP...` writes report.md, report.csv and report.html.

They lie in the folder given, or in the first of several. `--pictures RUN` first draws what the run learned (pictures.py).
Without arguments it prints the README's tables (papers/tables.py).
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.papers import tables
from cnn_spmd.report.write import write
from cnn_spmd.training import environment


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    1 says that the tables could not be printed, 2 is for bad input, 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cnn_spmd.report",
        description=(
            "Writes report.md, report.csv and report.html (tables and charts, no network needed) on runs and sweeps into the "
            "folder given, or into the first of several. Without arguments: prints the README's tables from results/."
        ),
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=pathlib.Path,
        metavar="RUN_OR_SWEEP",
        help="a --workdir of launch.py",
    )
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="first draw what each RUN learned, from its newest checkpoint: "
        "the first layer's filters, test images with their most probable classes, nearest neighbours",
    )
    parser.add_argument(
        "--data_dir", metavar="PATH", help="with --pictures: where the run's data.dir is now"
    )
    arguments = parser.parse_args(argv)
    folders = arguments.folders
    if arguments.pictures and not folders:
        parser.error("--pictures: expected the folder of a run")
    if arguments.data_dir is not None and not arguments.pictures:
        parser.error("--data_dir: expected --pictures with it")
    if not folders:
        print(*(table() for table in tables.TABLES.values()), sep="\n\n")
        return environment.exit_code_of_output()
    try:
        if arguments.pictures:
            from cnn_spmd.report import pictures

            for folder in folders:
                pictures.draw(folder, arguments.data_dir)
        paths = write(folders)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if len(folders) > 1:
        print(f"One report on all {len(folders)} folders, in the first:")
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    environment.protect_streams()
    sys.exit(main())
