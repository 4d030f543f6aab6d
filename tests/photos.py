"""What the tests of photographs share: a small folder of images, and loading it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import ml_collections
import numpy as np
import pyarrow
import tensorflow_datasets as tfds
from PIL import Image
from pyarrow import parquet

from cnn_spmd.data import dataset, registry

SIZE = 16  # of the decoded squares, in pixels

# Two classes: 3 + 2 images to train on, 1 + 1 to test on.
PETS = (
    "train/dog/b.jpg",
    "train/dog/a.JPEG",
    "train/cat/c.png",
    "train/cat/d.jpeg",
    "train/cat/e.jpg",
    "val/cat/a.jpg",
    "val/dog/a.jpg",
)


def colours(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth image, which JPEG and rescaling change little.

    It is uint8 [height, width, 3].
    """
    start, end = np.random.default_rng(seed).integers(256, size=(2, 3))
    down, across = np.linspace(0, 1, height), np.linspace(0, 1, width)
    along = np.add.outer(down, across)[..., None] / 2
    return (start * (1 - along) + end * along).astype(np.uint8)


def write_image(path: Path, image: np.ndarray | Image.Image) -> None:
    """Write an image as PNG or JPEG, by its suffix; make the folders that are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if path.suffix == ".png":
        image.save(path, "png")
    else:
        image.save(path, "jpeg", quality=95)


def write_pets(root: Path) -> Path:
    """Write PETS below `root`, each with colours of its own."""
    for seed, name in enumerate(PETS):
        write_image(root / name, colours(40, 30, seed))
    return root


def load(
    root: Path | str, name: str = "folder", size: int = SIZE, skip_bad: int = 0, **check
) -> dataset.Dataset:
    """Load photographs as launch.py does."""
    data = dict(name=name, dir=str(root), image_size=size, skip_bad=skip_bad)
    return registry.load(ml_collections.ConfigDict(data), **check)


def store(tmp_path: Path) -> Path:
    """Return the folder that holds all prepared data sets of a test."""
    return tmp_path / "tfds/cnn_spmd_photographs"


def prepared_folders(tmp_path: Path) -> list[Path]:
    """Return the folders of data sets that are prepared to the end."""
    return sorted(path for path in store(tmp_path).glob("*") if not path.suffix)


def assert_same(found: dataset.Dataset, expected: dataset.Dataset) -> None:
    """Fail unless two data sets hold the same arrays."""
    for field, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[field], array, err_msg=field)
    assert found.digest == expected.digest


def to_tfrecord(folder: Path) -> None:
    """Turn a data set of TFDS in array_record files into one in TFRecord files.

    TFDS itself writes these by TensorFlow.
    """

    def write(path: Path, records: list[bytes]) -> None:
        # Each record is its length, a checksum of that, the content, and a checksum of it.
        parts = (struct.pack("<Qxxxx", len(each)) + each + bytes(4) for each in records)
        path.write_bytes(b"".join(parts))

    change_format(folder, "tfrecord", write)


def to_parquet(folder: Path) -> None:
    """Turn a data set of TFDS in array_record files into one in Parquet files.

    TFDS 4.9.10 itself loses examples where it writes these.
    """

    def write(path: Path, records: list[bytes]) -> None:
        parquet.write_table(pyarrow.table({"data": pyarrow.array(records, pyarrow.binary())}), path)

    change_format(folder, "parquet", write)


def change_format(folder: Path, form: str, write: Callable[[Path, list[bytes]], None]) -> None:
    """Replace the array_record files of each split by two of another format."""
    info = json.loads((folder / "dataset_info.json").read_text())
    builder = tfds.builder_from_directory(folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in info["splits"]:
        records = list(builder.as_data_source(split["name"], deserialize_method=raw))
        half = len(records) // 2
        for i, part in enumerate((records[:half], records[half:])):
            name = f"{info['name']}-{split['name']}.{form}-0000{i}-of-00002"
            write(folder / name, part)
        split["shardLengths"] = [str(half), str(len(records) - half)]
    for path in folder.glob("*.array_record*"):
        path.unlink()
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": form}))


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: -len(content) // 2])


def empty(path: Path) -> None:
    """Leave nothing in a file."""
    path.write_bytes(b"")


def write_tiff(path: Path) -> None:
    """Write a TIFF file of numbers between 0 and 1, which would all become black."""
    Image.fromarray(np.random.default_rng(0).random((20, 20), np.float32)).save(path, "tiff")


def write_eps(path: Path) -> None:
    """Write an EPS file: a program, which Ghostscript would run."""
    Image.new("RGB", (20, 20)).save(path, "eps")
