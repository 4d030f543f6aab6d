"""The data sets, as arrays on the host: CIFAR-10, scikit-learn's digits, photographs, and random images for timing.

Legend: N images, H rows, W columns, C = 3 channels (red, green, blue).
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable

import ml_collections
import numpy as np
from PIL import Image

from cnn_spmd.data import cifar10_archive, digest
from cnn_spmd.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str                     # what it really is: "digits" even where cifar10 was asked for
    train_images: np.ndarray      # uint8 [N, H, W, C]; in memory, or photographs as np.memmap
    train_labels: np.ndarray      # int32 [N]
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    mirror: bool                  # a mirrored image keeps its label (digits: no)
    fallback: str | None = None   # the data set that was asked for, where this one stands in for it
    files: str = ""               # a digest of its files' names and sizes, where the name does not have one
    digest: str = ""              # of all pixels and labels; "": they are still to be decoded
    skipped: int = 0              # photographs that cannot be read and are left out


def load(data: ml_collections.ConfigDict, check: Callable[[Dataset], object] = lambda _: None) -> Dataset:
    """Loads the data set that config.data describes, whose numbers are valid ones.

    It reads the fields name, dir, fallback, image_size, skip_bad and synthetic.*.
    check: sees photographs that are still to be decoded as black ones, so that what does not fit is refused before.
    Raises UserError for an unknown name or fallback, a missing or damaged data.dir, more than fits in memory, and where
    CIFAR-10 is not to be had and data.fallback is "".
    """
    loaders = {"cifar10": load_cifar10, "digits": load_digits, "synthetic": load_synthetic,
               **dict.fromkeys(("folder", "imagenet2012", "imagenette"), functools.partial(load_photographs, check=check))}
    if data.name not in loaders:
        raise UserError(f"data.name={data.name}: not a data set; choose from {', '.join(loaders)}")
    try:
        return loaders[data.name](data)
    except MemoryError as error:
        raise UserError(f"data.name={data.name}: does not fit in this machine's memory ({error})") from None


def load_cifar10(data: ml_collections.ConfigDict) -> Dataset:
    """CIFAR-10, 50,000 + 10,000 images; or the digits, where it is not to be had and data.fallback says so."""
    from cnn_spmd.data import cifar10  # imports TFDS, which takes a second: the other data sets need not wait for it

    if data.fallback not in ("", "digits"):
        raise UserError(f'data.fallback={data.fallback}: choose digits, or "" to make a missing CIFAR-10 an error')
    try:
        arrays = cifar10.load(data.dir)
    except cifar10.Unreachable as error:
        give = f"give {cifar10_archive.ARCHIVE} or the folder {cifar10_archive.FOLDER} by --config.data.dir=PATH"
        if not data.fallback:
            raise cifar10.Unreachable(f"data.name=cifar10: {error}; {give}") from error
        lines = ["WARNING: THIS RUN DOES NOT USE CIFAR-10. It uses scikit-learn's 1,797 handwritten digits instead.",
                 f"Why: {error}", f"To use CIFAR-10, {give}", 'To make this an error: --config.data.fallback=""']
        print("", "!" * 110, *(f"!! {line}" for line in lines), "!" * 110, "", sep="\n", file=sys.stderr, flush=True)
        return dataclasses.replace(load_digits(data), fallback="cifar10")
    return Dataset(name="cifar10", **arrays, class_names=cifar10_archive.CLASS_NAMES, mirror=True,
                   digest=digest.of_arrays(arrays))


def load_digits(data: ml_collections.ConfigDict) -> Dataset:
    """scikit-learn's 8x8 digits as 32x32x3 images: 1,437 to train on, 360 to test on, the same ones every time."""
    from sklearn import datasets, model_selection  # another second

    grey_NHW, labels = datasets.load_digits(return_X_y=True)
    grey_NHW = np.round(grey_NHW.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # they count 0 to 16
    images = np.stack([np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR))
                       for grey in grey_NHW])
    images = np.repeat(images[..., None], 3, axis=-1)
    train, test = model_selection.train_test_split(np.arange(len(labels)), test_size=360, stratify=labels,
                                                   random_state=0)
    labels = labels.astype(np.int32)
    arrays = dict(train_images=images[train], train_labels=labels[train],
                  test_images=images[test], test_labels=labels[test])
    return Dataset(name="digits", **arrays, class_names=tuple("0123456789"), mirror=False,
                   digest=digest.of_arrays(arrays))


def load_photographs(data: ml_collections.ConfigDict, check: Callable[[Dataset], object]) -> Dataset:
    """Photographs in class folders, or those of a TFDS data set, as squares of data.image_size pixels; read from disk."""
    from cnn_spmd.data import folder  # imports TFDS, as above

    def dataset(source: folder.Source, found: folder.Prepared) -> Dataset:
        name, files = (f"folder-{source.content}", "") if data.name == "folder" else (data.name, source.content)
        return Dataset(name=name, **found.arrays, class_names=source.class_names, mirror=True,
                       files=files, digest=found.digest, skipped=len(found.skipped))
    return dataset(*folder.load(data.name, data.dir, data.image_size,
                                lambda *found: check(dataset(*found)), data.get("skip_bad", 0)))


def load_synthetic(data: ml_collections.ConfigDict) -> Dataset:
    """Random images and labels of the sizes in data.synthetic, the same ones every time: for timing, not learning."""
    sizes = data.synthetic
    rng, arrays = np.random.Generator(np.random.SFC64(0)), {}
    for split, n in (("train", sizes.train_examples), ("test", sizes.test_examples)):
        shape = n, sizes.image_size, sizes.image_size, 3
        words = rng.bit_generator.random_raw(-(-math.prod(shape) // 8))  # eight bytes each: 5 times as fast as bytes
        arrays[f"{split}_images"] = words.view(np.uint8)[:math.prod(shape)].reshape(shape)
        arrays[f"{split}_labels"] = rng.integers(sizes.classes, size=n, dtype=np.int32)
    class_names = tuple(str(i) for i in range(sizes.classes))
    of_sizes = digest.of_text(f"SFC64(0) {sorted(sizes.items())}")  # that of pixels would take long
    return Dataset(name="synthetic", **arrays, class_names=class_names, mirror=True,
                   digest=of_sizes)
