"""Define a data set: arrays on the host.

Shapes: N images, H rows and as many columns W, C = 3 channels (red, green, blue).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from cnn_spmd.data import statistics
from cnn_spmd.errors import UserError

# Ends the name of a data set in which training images take the place of the test split.
VALIDATION = "_validation"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What the files of a run record of its data, besides the name.

    A loader of arrays may leave all of it out.
    """

    # The data set that was asked for, where this one stands in for it.
    fallback: str | None = None
    # A digest of its files' names and sizes, where the name does not contain one.
    files: str = ""
    # A digest of all pixels and labels, which the registry fills in. Photographs that are not
    # decoded yet have none.
    digest: str = ""
    # The number of photographs that cannot be read and are left out.
    skipped: int = 0
    # The number of test images that were training images, where there are no others (split.py).
    test_from_train: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset(Provenance):
    """Images and labels to train on and to test on."""

    # What the data really are: "digits" also where cifar10 was asked for.
    name: str
    # uint8 [N, H, W, C], in memory, or photographs as np.memmap. int32 [N].
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    # Whether a mirrored image keeps its label, which a digit does not.
    mirror: bool = True

    @property
    def preview(self) -> "Dataset":
        """Return the data set itself: nothing is left to read (Unread)."""
        return self

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Return the four arrays by the names of their fields."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and deviation of the training images (statistics.channel_statistics)."""
        return statistics.channel_statistics(statistics.sample(self.train_images))

    def with_validation(self, examples: int) -> "Dataset":
        """Return the data set with some training images in place of the test split.

        These are the last ones or, where the last ones lack a class, evenly spaced ones:
        photographs are sorted by class. The latter are copied to memory. The data set's name then
        ends in _validation. examples: how many images; 0: the data set as it is.
        Raises UserError where a class would be missing on either side.
        """
        if not examples:
            return self
        total = len(self.train_images)
        last = slice(total - examples, None), slice(total - examples)
        is_held_out = np.zeros(total, bool)
        is_held_out[np.arange(examples) * total // examples % total] = True
        classes = len(np.unique(self.train_labels))
        for held_out, rest in (last, (is_held_out, ~is_held_out)):
            counts = {len(np.unique(self.train_labels[part])) for part in (held_out, rest)}
            if examples < total and not self.fallback and counts == {classes}:
                return dataclasses.replace(
                    self,
                    name=f"{self.name}{VALIDATION}",
                    train_images=self.train_images[rest],
                    train_labels=self.train_labels[rest],
                    test_images=self.train_images[held_out],
                    test_labels=self.train_labels[held_out],
                )
        raise UserError(
            f"data.validation={examples}: {self.name} has {total} training images, expected all "
            f"its classes among {examples} of them and among the others, and no fallback"
        )

    def check(self) -> None:
        """Raise UserError for arrays of another form and for labels without a class."""
        classes = len(self.class_names)
        if classes < 2:
            self._refuse("class_names", f"{classes} class", "at least two classes")
        for split in ("train", "test"):
            shape = getattr(self.arrays[f"{split}_images"], "shape", ())
            expected = (*shape[:2], *shape[1:2], 3)
            self._check_array(
                f"{split}_images", np.uint8, expected, "uint8 [N, H, W, 3] with H = W"
            )
            n = shape[0]
            if not n:
                self._refuse(f"{split}_images", f"uint8 {shape}", "at least one image")
            field = f"{split}_labels"
            self._check_array(field, np.int32, (n,), f"int32 [{n}], one label per image")
            for label in (self.arrays[field].min(), self.arrays[field].max()):
                if not 0 <= label < classes:
                    expected = f"0 to {classes - 1} for {classes} class names"
                    self._refuse(field, f"label {label}", expected)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            shapes = f"{self.train_images.shape} and {self.test_images.shape}"
            self._refuse("train_images, test_images", shapes, "images of one size in both")

    def _check_array(
        self, field: str, dtype: type[np.generic], shape: tuple[int, ...], expected: str
    ) -> None:
        array = getattr(self, field)
        if not isinstance(array, np.ndarray):
            self._refuse(field, type(array).__name__, f"a NumPy array, {expected}")
        if array.dtype != dtype or array.shape != shape:
            self._refuse(field, f"{array.dtype} {array.shape}", expected)

    def _refuse(self, field: str, found: str, expected: str) -> None:
        raise UserError(f"data.name={self.name}: {field}: found {found}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class Unread:
    """A data set that is found, but not read yet: decoding photographs can take hours."""

    # Zeros in the shapes of what `read` returns; see `blank_arrays`.
    preview: Dataset
    read: Callable[[], Dataset]


Found = Dataset | Unread  # what a loader returns


def blank_arrays(examples: dict[str, int], side: int) -> dict[str, np.ndarray]:
    """Return zeros in the place of a data set's arrays; they take no memory.

    examples: the number of images in "train" and in "test"; side: of an image, in pixels.
    """
    arrays = {}
    for split, n in examples.items():
        arrays[f"{split}_images"] = np.broadcast_to(np.uint8(0), (n, side, side, 3))
        arrays[f"{split}_labels"] = np.broadcast_to(np.int32(0), (n,))
    return arrays
