"""Print the pages of results/: `python -m cnn_spmd.papers`; `--write` writes them."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.papers import measured, pages, tables
from cnn_spmd.training import environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m cnn_spmd.papers",
        description=(
            "Print the pages of results/, made from results/data: every published figure beside "
            "what was measured, accuracy by depth, errors by batch size, speeds."
        ),
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the pages, depth.svg and README's headline table instead",
    )
    parser.add_argument(
        "--depth_plot", type=pathlib.Path, metavar="FILE.svg", help="also draw accuracy by depth"
    )
    arguments = parser.parse_args(argv)
    picture = arguments.depth_plot
    try:
        if arguments.write:
            print(*pages.write_pages(), sep="\n")
        else:
            pages.print_pages()
        if picture:
            runs = measured.load_summaries(measured.DATA / "claims")
            picture.write_text(tables.depth_plot(runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        parser.error(f"--depth_plot={picture}: cannot be written ({error.strerror})")
    return environment.exit_code_of_output()


if __name__ == "__main__":
    environment.protect_streams()
    sys.exit(main())
