"""The data sets, as arrays on the host: CIFAR-10, scikit-learn's digits, photographs, and random images for timing.

Legend: N images, H rows, W columns, C = 3 channels (red, green, blue).
"""

import dataclasses
import functools
import sys
from collections.abc import Callable

import ml_collections
from absl import logging

from cnn_spmd.data import cifar10_archive, digest
from cnn_spmd.data.dataset import Dataset
from cnn_spmd.data.digits import load_digits
from cnn_spmd.data.synthetic import load_synthetic
from cnn_spmd.errors import UserError

# The config's fields that only some data sets use, by data set; one that is not here uses all.
PHOTOGRAPHS = ("data.dir", "data.flip", "data.image_size", "data.skip_bad")
FALLBACK = ("fallback", "fallback_epochs", "fallback_batch_size", "fallback_learning_rate")
SIZES = ("image_size", "classes", "train_examples", "test_examples")
USES = {
    "cifar10": ("data.dir", "data.flip", *(f"data.{name}" for name in FALLBACK)),
    "digits": (),
    "synthetic": ("data.flip", *(f"data.synthetic.{name}" for name in SIZES)),
    **dict.fromkeys(("folder", "imagenet2012", "imagenette"), PHOTOGRAPHS),
}


def load(
    data: ml_collections.ConfigDict, check: Callable[[Dataset], object] = lambda _: None
) -> Dataset:
    """Loads the data set that config.data describes, whose numbers are valid ones.

    It reads the fields name, dir, fallback, image_size, skip_bad and synthetic.*.
    check: sees photographs that are still to be decoded as black ones, so that what does not fit is refused before.
    Raises UserError for an unknown name or fallback, a missing or damaged data.dir, more than fits in memory, and where
    CIFAR-10 is not to be had and data.fallback is "".
    """
    loaders = {
        "cifar10": load_cifar10,
        "digits": load_digits,
        "synthetic": load_synthetic,
        **dict.fromkeys(
            ("folder", "imagenet2012", "imagenette"),
            functools.partial(load_photographs, check=check),
        ),
    }
    if data.name not in loaders:
        raise UserError(f"data.name={data.name}: not a data set; choose from {', '.join(loaders)}")
    try:
        return loaders[data.name](data)
    except MemoryError as error:
        raise UserError(
            f"data.name={data.name}: does not fit in this machine's memory ({error})"
        ) from None


def load_cifar10(data: ml_collections.ConfigDict) -> Dataset:
    """CIFAR-10, 50,000 + 10,000 images; or the digits, where it is not to be had and data.fallback says so."""
    from cnn_spmd.data import (
        cifar10,
    )  # imports TFDS, which takes a second: the other data sets need not wait for it

    if data.fallback not in ("", "digits"):
        raise UserError(
            f'data.fallback={data.fallback}: choose digits, or "" to make a missing CIFAR-10 an error'
        )
    try:
        arrays = cifar10.load(data.dir)
    except cifar10.Unreachable as error:
        give = f"give {cifar10_archive.ARCHIVE} or the folder {cifar10_archive.FOLDER} by --config.data.dir=PATH"
        if not data.fallback:
            raise cifar10.Unreachable(f"data.name=cifar10: {error}; {give}") from error
        lines = [
            "WARNING: THIS RUN DOES NOT USE CIFAR-10. It uses scikit-learn's 1,797 handwritten digits instead.",
            f"Why: {error}",
            f"To use CIFAR-10, {give}",
            'To make this an error: --config.data.fallback=""',
        ]
        print(
            "",
            "!" * 110,
            *(f"!! {line}" for line in lines),
            "!" * 110,
            "",
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
        return dataclasses.replace(load_digits(data), fallback="cifar10")
    found = digest.of_arrays(arrays)
    if found != cifar10_archive.DIGEST:
        logging.warning(
            "data.dir=%s: these are not CIFAR-10's pixels and labels (their digest is %s, CIFAR-10's %s). "
            "Using them all the same.",
            data.dir,
            found,
            cifar10_archive.DIGEST,
        )
    return Dataset(
        name="cifar10", **arrays, class_names=cifar10_archive.CLASS_NAMES, mirror=True, digest=found
    )


def load_photographs(
    data: ml_collections.ConfigDict, check: Callable[[Dataset], object]
) -> Dataset:
    """Photographs in class folders, or those of a TFDS data set, as squares of data.image_size pixels; read from disk."""
    from cnn_spmd.data import folder  # imports TFDS, as above

    def dataset(source: folder.Source, found: folder.Prepared) -> Dataset:
        name, files = (
            (f"folder-{source.content}", "")
            if data.name == "folder"
            else (data.name, source.content)
        )
        return Dataset(
            name=name,
            **found.arrays,
            class_names=source.class_names,
            mirror=True,
            files=files,
            digest=found.digest,
            skipped=len(found.skipped),
        )

    return dataset(
        *folder.load(
            data.name,
            data.dir,
            data.image_size,
            lambda *found: check(dataset(*found)),
            data.get("skip_bad", 0),
        )
    )
