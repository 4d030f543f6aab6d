"""Load images and labels from the arrays of one .npz file, as NumPy, Keras and others write it.

Shapes: N images, H rows and W columns, C channels.
"""

import zipfile
import zlib
from collections.abc import Set
from pathlib import Path

import ml_collections
import numpy as np
from absl import logging
from PIL import Image

from cnn_spmd.data import digest, square
from cnn_spmd.data.dataset import Dataset
from cnn_spmd.data.split import hold_out
from cnn_spmd.errors import UserError, one_line

# The names that images and labels may have, by split: of Keras, scikit-learn's users, and MedMNIST.
NAMES = (("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"))
# Their names where there are no splits.
WHOLE = (("images", "labels"), ("x", "y"), ("X", "y"))
TESTS = ("val", "test")  # what to test on: the first of these that there is
EXPECTED = (
    "expected x_train, y_train, x_test, y_test, or train_images, train_labels, test_images, "
    "test_labels, or images, labels"
)


def load(data: ml_collections.ConfigDict) -> Dataset:
    """Return the images and labels of the file data.dir; it is read at each start.

    Images are uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]; grey ones become RGB. Labels are
    integers or strings, [N] or [N, 1], which become 0, 1, ... in their order. data.image_size: the
    side to cut and rescale the images to; 0 takes squares as they are.

    Raises UserError for a file that cannot be read, and for arrays of other names or forms.
    """
    where = f"data.dir={data.dir}"
    arrays, held_out = {}, 0
    splits = read(Path(data.dir).expanduser(), where)
    class_names = np.unique(splits["train"][1])
    if "test" not in splits:
        images, labels = splits["train"]
        is_test = hold_out(labels, where)
        splits = dict(train=(images[~is_test], labels[~is_test]))
        splits["test"] = images[is_test], labels[is_test]
        held_out = int(is_test.sum())
    for split, (images, labels) in splits.items():
        if unknown := set(labels.tolist()) - set(class_names.tolist()):
            raise UserError(
                f"{where}: label {min(unknown)} is only among those to test on, expected it among "
                "those to train on"
            )
        arrays[f"{split}_images"] = to_squares(images, data.image_size, where)
        arrays[f"{split}_labels"] = np.searchsorted(class_names, labels).astype(np.int32)
    content = digest.of_arrays(arrays)
    return Dataset(
        name=f"npz-{content[:8]}",
        **arrays,
        class_names=tuple(map(str, class_names)),
        digest=content,
        test_from_train=held_out,
    )


def read(path: Path, where: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return images and labels of the file's "train" and, where there is one, its "test" split.

    Labels are [N]. where: names the file. Raises UserError as `load`. No pickle is loaded.
    """
    if not zipfile.is_zipfile(path):
        problem = "no .npz file" if path.exists() else "no such file"
        raise UserError(f"{where}: {problem}, expected one that numpy.savez has written")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = find_names(set(file.files), where)
            arrays = {name: file[name] for pair in names.values() for name in pair}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where}: cannot be read ({one_line(error)}), expected arrays of numbers or strings"
        ) from error
    splits = {}
    for split, (images, labels) in names.items():
        check_images(arrays[images], f"{where}: {images}")
        count = len(arrays[images])
        splits[split] = arrays[images], flat_labels(arrays[labels], count, f"{where}: {labels}")
    return splits


def find_names(present: Set[str], where: str) -> dict[str, tuple[str, str]]:
    """Return the names of images and labels, by split.

    A warning names a split that is not used. Raises UserError without those of "train", and for
    images to test on without labels, or the reverse.
    """
    found = {}
    for split in ("train", *TESTS):
        pairs = [tuple(name.format(split) for name in pair) for pair in NAMES]
        whole = [pair for pair in pairs if present.issuperset(pair)]
        halves = [pair for pair in pairs if present.intersection(pair)]
        if whole:
            found[split] = whole[-1]
        elif halves and split in TESTS:
            given, missing = sorted(halves[0], key=present.__contains__, reverse=True)
            raise UserError(f"{where}: holds {given} without {missing}, expected both or neither")
    if "train" not in found:
        for pair in WHOLE:
            if present.issuperset(pair):
                return dict(train=pair)
        raise UserError(f"{where}: holds {', '.join(sorted(present)) or 'nothing'}, {EXPECTED}")
    tests = [found[split] for split in TESTS if split in found]
    for unused, _ in tests[1:]:
        logging.warning("%s: tests on %s; %s is not used.", where, tests[0][0], unused)
    return dict(train=found["train"], test=tests[0]) if tests else dict(train=found["train"])


def check_images(images: np.ndarray, where: str) -> None:
    """Raise UserError unless images are uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]."""
    if images.dtype != np.uint8:
        raise UserError(
            f"{where}: found {images.dtype}, expected uint8 from 0 to 255: of floats from 0 to 1, "
            "save np.round(255 * x).astype(np.uint8)"
        )
    if 0 in images.shape or not (
        images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    ):
        raise UserError(
            f"{where}: found the shape {images.shape}, expected [N, H, W], [N, H, W, 1] or "
            "[N, H, W, 3]"
        )


def flat_labels(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Return labels as [N]. Raises UserError unless they are N integers or strings."""
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "iuU":
        raise UserError(
            f"{where}: found {labels.dtype} {labels.shape}, expected {count} integers or strings, "
            "one per image: of one-hot rows, save y.argmax(1)"
        )
    return labels.reshape(count)


def to_squares(images: np.ndarray, size: int, where: str) -> np.ndarray:
    """Return images as uint8 [N, size, size, 3]; with size 0, squares keep their side.

    Raises UserError for oblong images with size 0.
    """
    height, width = images.shape[1:3]
    if not size and height != width:
        raise UserError(
            f"{where}: holds images of {height}x{width} pixels, expected squares: set "
            "--config.data.image_size, to which their centres are cut and rescaled"
        )
    if images.ndim == 3 or images.shape[3] == 1:
        images = np.repeat(images.reshape(len(images), height, width, 1), 3, axis=3)
    if height == width == (size or height):
        return images
    return np.stack([square.fit(Image.fromarray(image), size) for image in images])
