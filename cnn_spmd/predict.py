"""Say what images show: `python -m cnn_spmd.predict RUN IMAGE...`.

RUN is a --workdir of launch.py, whose newest checkpoint is taken, or a weights file of
`python -m cnn_spmd.export`. An image becomes what the run's evaluation sees: the central square,
rescaled to the size of the run's images, cropped and normalised as the config says. Its five most
probable classes are printed, or as many as there are. The first line says on which images the
network was trained, and its classes: it knows no others. A line warns of an image that is far too
light or dark, and says whether --invert or cutting out the object mends that. It also warns of
colours that the network never saw, and says where white was put behind a transparent image. --json
has the line as `warning`. A run's folder needs the run's data set, as the training images
normalise; a weights file does not.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import textwrap
from collections.abc import Sequence

import jax
import numpy as np

from cnn_spmd import experiment
from cnn_spmd.data import square
from cnn_spmd.errors import UserError
from cnn_spmd.training import environment, restore, terminal, weights
from cnn_spmd.training.setup import Setup

CLASSES = 5  # shown of each image
# A quarter of the values of a pixel. An image whose mean pixel is this far from the mean by which
# the run normalises may be inverted.
FAR = 64
# An image may be mostly empty where its mean pixel is this many times nearer to black or white than
# the mean by which the run normalises: its object fills less than a third of it.
EMPTY = 3
# A pixel is coloured where its channels differ by more than this. JPEG's rounding gives less.
COLOURED = 16
# The mean pixel of grey training images has equal channels, up to the rounding of float32.
GREY = 0.01
LONGEST_CLASSES = 80  # characters of the names of the classes


def predict(
    source: pathlib.Path | str,
    images: Sequence[pathlib.Path | str],
    data_dir: str | None = None,
    invert: bool = False,
) -> list[dict]:
    """Return the most probable classes of each image, the most probable first.

    source: the folder of a run, or a weights file. data_dir: where the run's data set is now, if it
    has moved. invert: turn dark on light into light on dark. Each entry has the image's path, in
    `classes` dicts with `class` (its name), `index` and `probability`, and in `warning` what was
    said of the image, or None.
    Raises UserError for an image that cannot be read or is a network, and as
    restore.on_one_device.
    """
    source, images = pathlib.Path(source), [pathlib.Path(image) for image in images]
    for image in images:
        if weights.is_file(image) or (image / "config.json").exists():
            raise UserError(
                f"{image}: is a network, expected an image: predict takes one network, here "
                f"{source}"
            )
    with restore.locked(source):
        setup, state, *_ = restore.on_one_device(source, data_dir)
    side, names = setup.data.train_images.shape[1], setup.data.class_names
    decoded = [decode(image, side) for image in images]
    terminal.say(f"{source}: {trained_on(setup)}")
    usual = np.mean(setup.functions.preprocessing.mean)
    scores = jax.jit(setup.functions.scores)
    found = []
    for image, (pixels_HWC, is_transparent) in zip(images, decoded, strict=True):
        said = ["white is put behind its transparent pixels"] * is_transparent
        if invert:
            pixels_HWC = 255 - pixels_HWC
        if pixels_HWC.min() == pixels_HWC.max():
            said.append("nothing is on it: all its pixels are alike")
        else:
            said += warnings_of_brightness(pixels_HWC.mean(), usual, invert)
        if is_grey(setup) and np.ptp(pixels_HWC, axis=-1).max() > COLOURED:
            said.append("it is in colour, but the network was trained on grey images")
        warning = "; ".join(said) or None
        if warning:
            terminal.say(f"warning: {image}: {warning}")
        probabilities_C = np.exp(scores(state, pixels_HWC[None])[0])
        best = np.argsort(-probabilities_C, kind="stable")[:CLASSES]
        classes = [
            {"class": names[i], "index": int(i), "probability": float(probabilities_C[i])}
            for i in best
        ]
        found.append(dict(image=str(image), classes=classes, warning=warning))
    return found


def trained_on(setup: Setup) -> str:
    """Say on which images a network was trained, and which classes it knows."""
    side, names = setup.data.train_images.shape[1], setup.data.class_names
    classes = textwrap.shorten(", ".join(names), LONGEST_CLASSES, placeholder=" ...")
    colours = "grey images" if is_grey(setup) else "images"
    return (
        f"trained on {setup.shown_data}, {colours} of {side}x{side} pixels; it knows {len(names)} "
        f"classes: {classes}"
    )


def is_grey(setup: Setup) -> bool:
    """Return whether the training images are grey; False where their mean pixel is not known."""
    return bool(np.ptp(setup.functions.preprocessing.mean, axis=-1).max() < GREY)


def decode(image: pathlib.Path, side: int) -> tuple[np.ndarray, bool]:
    """Return an image as the run's data set holds its images, and whether it is transparent.

    It is uint8 [side, side, 3]. Raises UserError for an image that cannot be read.
    """
    try:
        with square.opened(image) as opened:
            return square.pixels_of(opened, side), square.is_transparent(opened)
    except Exception as error:  # Pillow raises many types for damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{image}: cannot be read ({reason}): give another image") from error


def warnings_of_brightness(mean: float, usual: float, invert: bool) -> list[str]:
    """Return a warning of an image that looks inverted or mostly empty; [] for another image.

    An inverted one would be much nearer to the training images if inverted again. mean: the image's
    mean pixel. usual: the mean pixel by which the run normalises. invert: whether the image is
    inverted already.
    """
    remedies, mended = [], mean
    distance, inverted = abs(mean - usual), abs(255 - mean - usual)
    if distance > FAR and inverted < distance / 2:
        remedies.append("leave --invert out" if invert else "add --invert")
        mended = 255 - mean
    if mended < usual / EMPTY or 255 - mended < (255 - usual) / EMPTY:
        remedies.append("cut out the object, as the image looks mostly empty")
    if not remedies:
        return []
    return [
        f"its mean pixel is {mean:.0f}, but the network expects about {usual:.0f} (0: black, "
        f"255: white): {', and '.join(remedies)}"
    ]


def as_text(predictions: list[dict]) -> str:
    """Return predictions as lines: an image, then a line for each of its classes."""
    lines = []
    for prediction in predictions:
        lines.append(prediction["image"])
        for row in prediction["classes"]:
            lines.append(f"  {row['probability']:7.2%}  {row['class']}")
    return "\n".join(lines)


def parser() -> environment.Parser:
    """Return the parser of the command line."""
    made = environment.Parser("predict", __doc__)
    made.add_argument("run", metavar="RUN", type=pathlib.Path, help="a run or a weights file")
    made.add_argument("images", metavar="IMAGE", nargs="+", type=pathlib.Path)
    made.add_argument(
        "--invert", action="store_true", help="invert the images: dark on light <-> light on dark"
    )
    made.add_argument("--json", action="store_true", help="print a list of JSON objects")
    restore.add_arguments(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; 2: bad input, 130: Ctrl-C."""
    return environment.exit_code_of(lambda: print_predictions(parser().parse_args(argv)))


def print_predictions(arguments: argparse.Namespace) -> None:
    """Do what the command line says."""
    environment.prepare()
    environment.device_count()
    if arguments.config:
        experiment.load_file(arguments.config)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the predictions alone
        found = predict(arguments.run, arguments.images, arguments.data_dir, arguments.invert)
    print(json.dumps(found, indent=1) if arguments.json else as_text(found))


if __name__ == "__main__":
    environment.protect_streams()
    sys.exit(main())
