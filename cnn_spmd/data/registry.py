"""Load a data set by its name. Add your own: DATASETS["mine"] = load_mine.

A loader gets config.data and returns a Dataset, or Unread where reading takes long. USES may have
an entry for it too: then fields that it does not use are refused when they are set by hand.
"""

import dataclasses
import sys
import textwrap
from collections.abc import Callable

import ml_collections
from absl import logging

from cnn_spmd.data import cifar10, cifar10_archive, digest, npz, photographs, tfds
from cnn_spmd.data.dataset import Dataset, Found, Unread
from cnn_spmd.data.digits import load_digits
from cnn_spmd.data.synthetic import load_synthetic
from cnn_spmd.entries import Entries
from cnn_spmd.errors import UnknownName, UserError

BANNER = 80  # columns of a warning: as many as a usual terminal has

Loader = Callable[[ml_collections.ConfigDict], Found]


def load(
    data: ml_collections.ConfigDict, check: Callable[[Dataset], object] = lambda _: None
) -> Dataset:
    """Return the data set that config.data describes, with the digest of its arrays.

    It does what `find` and `read` do. Raises UserError as they do.
    """
    return read(data, find(data), check)


def find(data: ml_collections.ConfigDict) -> Found:
    """Return the data set that config.data describes, or Unread where reading takes long.

    data: a ConfigDict in which the numbers are valid. Raises UserError for an unknown name, for
    what the loader refuses, for arrays of another form than Dataset has, and for data that do not
    fit in memory.
    """
    return checked(data, lambda: loader_of(data)(data))


def read(
    data: ml_collections.ConfigDict,
    found: Found,
    check: Callable[[Dataset], object] = lambda _: None,
) -> Dataset:
    """Return the data set that `find` has found, or that was made in Python.

    check: called with zeros of the same shapes before photographs are decoded, so that a bad config
    fails in seconds. Raises UserError as `find`.
    """
    if not isinstance(found, Unread):
        _refuse_malformed(data, found)
        return found
    check(found.preview)
    return checked(data, found.read)


def checked(data: ml_collections.ConfigDict, load: Callable[[], Found]) -> Found:
    """Return what `load` returns; a Dataset is checked, and gets a digest. Raises as `find`."""
    try:
        found = load()
    except MemoryError as error:
        raise UserError(
            f"data.name={data.name}: does not fit in this machine's memory ({error})"
        ) from None
    if isinstance(found, Unread):
        return found
    _refuse_malformed(data, found)
    if not found.digest:
        found = dataclasses.replace(found, digest=digest.of_arrays(found.arrays))
    return found


def _refuse_malformed(data: ml_collections.ConfigDict, found: object) -> None:
    """Raise UserError unless `found` is a Dataset whose arrays are as they should be."""
    if not isinstance(found, Dataset):
        raise UserError(
            f"data.name={data.name}: found {type(found).__name__} in its place, expected a Dataset"
        )
    found.check()


def loader_of(data: ml_collections.ConfigDict) -> Loader:
    """Return the loader of data.name. Raises UserError for an unknown name."""
    if data.name in DATASETS:
        return DATASETS[data.name]
    if data.name.startswith(tfds.PREFIX):
        return photographs.load
    root = photographs.root_of(data.dir)
    if tfds.prepared_folder(data.name, root):
        return photographs.load
    name = data.name.lower()
    meant = tfds.PREFIX + name if name not in DATASETS and tfds.is_in_catalog(name) else ""
    more = f", {tfds.PREFIX}NAME of TFDS's catalog, or what TFDS has prepared in {root}"
    raise UnknownName("data.name", data.name, DATASETS, more, meant)


def may_use_tfds(data: ml_collections.ConfigDict) -> bool:
    """Return whether `find` may import TFDS, which must not happen in a thread beside imports.

    While TFDS is imported, it replaces Python's import statement for all threads (etils.epy,
    lazy_imports): modules that another thread imports then break.
    """
    if data.name == "cifar10":
        return not cifar10.is_here(data.dir)
    if DATASETS.get(data.name, photographs.load) is not photographs.load:
        return False
    return not photographs.is_in_folders(data.name, data.dir)


def load_cifar10(data: ml_collections.ConfigDict) -> Dataset:
    """Load CIFAR-10; or the digits, where it is missing and data.fallback says so.

    Raises UserError for a wrong data.dir, and where CIFAR-10 is missing and data.fallback is "".
    """
    if data.fallback not in ("", "digits"):
        raise UserError(
            f'data.fallback={data.fallback}: choose digits, or "" to make a missing CIFAR-10 an '
            "error"
        )
    try:
        found = cifar10.read(cifar10.find(data.dir))
    except cifar10.Unreachable as error:
        if not data.fallback:
            message = f"data.name=cifar10: {error}; {cifar10.REMEDY}"
            raise cifar10.Unreachable(message) from error
        warn_of_digits(str(error))
        return dataclasses.replace(load_digits(data), fallback="cifar10")
    if found.digest != cifar10_archive.DIGEST:
        logging.warning(
            "data.dir=%s: these are not CIFAR-10's pixels and labels (their digest is %s, "
            "CIFAR-10's %s). Using them all the same.",
            data.dir,
            found.digest,
            cifar10_archive.DIGEST,
        )
    names = cifar10_archive.CLASS_NAMES
    return Dataset(name="cifar10", **found.arrays, class_names=names, digest=found.digest)


def warn_of_digits(reason: str) -> None:
    """Print a banner that nobody can miss: the digits stand in for CIFAR-10."""
    lines = [
        "WARNING: THIS RUN DOES NOT USE CIFAR-10.",
        "It uses scikit-learn's 1,797 handwritten digits instead.",
        f"Why: {reason}",
        f"To use CIFAR-10, {cifar10.REMEDY}",
        'To make this an error: --config.data.fallback=""',
    ]
    rule = "!" * BANNER
    marks = dict(initial_indent="!! ", subsequent_indent="!!   ", break_long_words=False)
    text = "\n".join(textwrap.fill(line, BANNER, break_on_hyphens=False, **marks) for line in lines)
    print(f"\n{rule}\n{text}\n{rule}\n", file=sys.stderr, flush=True)


DATASETS: Entries[str, Loader] = Entries(
    "DATASETS",
    {
        "cifar10": load_cifar10,
        "digits": load_digits,
        "synthetic": load_synthetic,
        "folder": photographs.load,
        "imagenet2012": photographs.load,
        "imagenette": photographs.load,
        "npz": npz.load,
    },
)

# The config's fields that only some data sets use, by data set; one that is not here uses all.
# What stands before a colon in data.name is looked up.
PHOTOGRAPHS = ("data.dir", "data.flip", "data.image_size", "data.skip_bad")
FALLBACK = ("fallback", "fallback_epochs", "fallback_batch_size", "fallback_learning_rate")
SIZES = ("image_size", "classes", "train_examples", "test_examples")
USES = {
    "cifar10": ("data.dir", "data.flip", *(f"data.{name}" for name in FALLBACK)),
    "digits": (),
    "synthetic": ("data.flip", *(f"data.synthetic.{name}" for name in SIZES)),
    **dict.fromkeys(("folder", "imagenet2012", "imagenette", "tfds"), PHOTOGRAPHS),
    "npz": ("data.dir", "data.flip", "data.image_size"),
}
