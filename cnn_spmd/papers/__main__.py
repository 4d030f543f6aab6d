"""`python -m cnn_spmd.papers` prints every published figure, and what was measured here beside it."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd.papers import claims
from cnn_spmd.papers.measured import HEADER, LEGEND, RESULTS, batch_table, tables
from cnn_spmd.report import page
from cnn_spmd.training import environment


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cnn_spmd.papers",
        description=(
            "Prints published figures beside measured ones (from results/), accuracy by depth, and errors by batch size."
        ),
    )
    parser.add_argument(
        "--depth_plot", type=pathlib.Path, metavar="FILE.svg", help="also draw accuracy by depth"
    )
    picture = parser.parse_args(argv).depth_plot
    for title, found in tables().items():
        print(f"{title}\n\n{page.markdown_table(HEADER, found)}\n")
    runs = claims.read(RESULTS / "claims")
    print(
        f"{LEGEND}\n\nAccuracy by depth, on CIFAR-10 (experiments/deeper_cifar.py)\n\n{claims.depth_table(runs)}\n\n"
        f"Errors by batch size (experiments/owt_cifar.py, owt_imagenet.py:imagenette)\n\n{batch_table(runs)}\n\n"
        f"A neuron that sees a whole image has {claims.weights_of_a_neuron(32):,} weights at 32x32x3, "
        f"{claims.weights_of_a_neuron(200):,} at 200x200x3."
    )
    if picture:
        try:
            picture.write_text(claims.depth_plot(runs))
        except OSError as error:
            parser.error(f"--depth_plot={picture}: cannot be written ({error.strerror})")


if __name__ == "__main__":
    environment.protect_streams()
    main()
    sys.exit(environment.exit_code_of_output())
