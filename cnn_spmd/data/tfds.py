"""Find data sets that TFDS (tensorflow_datasets) has prepared.

TFDS itself is imported only where its files are read: that takes a second.
"""

import functools
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from cnn_spmd.data import tfrecord
from cnn_spmd.data.folder import identity_of
from cnn_spmd.data.source import Photograph, Source, Split, key_of
from cnn_spmd.errors import UserError, one_line

INFO = "dataset_info.json"  # in each folder of a prepared data set

# What `tfds build` needs for these besides the name: imagenette has six configurations.
CONFIGS = {"imagenette": "/full-size-v2"}
MANUAL = {
    "imagenet2012": "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from "
    "https://image-net.org into MANUAL"
}


def data_directory() -> Path:
    """Return TFDS's data directory, which also holds what we prepare."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def prepared_folder(name: str, root: Path) -> Path | None:
    """Return where TFDS has prepared a data set, its last version, or None."""
    if not name.isidentifier():  # as all of TFDS's names
        return None
    found = sorted(path.parent for path in (root / name).rglob(INFO))
    # TFDS prepares in a folder "incomplete..." and renames it at the end.
    complete = [path for path in found if "incomplete" not in path.name]
    return complete[-1] if complete else None


def how_to_build(name: str, root: Path) -> str:
    """Return the command that prepares a data set in `root`."""
    command = (
        f"tfds build {name}{CONFIGS.get(name, '')} --file_format=array_record --data_dir={root}"
    )
    if name in MANUAL:
        command += f" --manual_dir=MANUAL; {MANUAL[name]}"
    return f"prepare it, where TensorFlow is installed too, by: {command}"


def find_source(name: str, root: Path) -> Source:
    """Return the data set that TFDS has prepared in `root`; nothing is decoded.

    It trains on the split `train`, and tests on `validation`, or `test` where there is none.
    Raises UserError, with the command that prepares it, where it is missing, damaged, without
    images and labels, or in a file format that needs TensorFlow.
    """
    remedy = (
        f"{how_to_build(name, root)}; or give its images in class folders by "
        "--config.data.dir=DIR (train/CLASS/*, val/CLASS/*)"
    )
    folder = prepared_folder(name, root)
    if folder is None:
        raise UserError(f"data.name={name}: {root / name} holds no prepared data set: {remedy}")
    try:
        import tensorflow_datasets

        info = tensorflow_datasets.builder_from_directory(folder).info
        class_names = class_names_of(info.features)
        names = split_names(info.splits, f"data.name={name}: {folder}")
        examples = open_splits(folder, names)
    except Exception as error:
        # TFDS raises many types for another file format, a missing split, a damaged file.
        raise UserError(
            f"data.name={name}: {folder} cannot be read ({one_line(error)}): {remedy}"
        ) from error
    content, fingerprint = digests_of(folder)
    splits = {
        split: make_split(found, split_name, fingerprint)
        for split, found, split_name in zip(("train", "test"), examples, names, strict=True)
    }
    return Source(str(folder), splits, class_names, content, fingerprint)


def open_splits(folder: Path, names: Sequence[str]) -> list[Sequence[dict]]:
    """Return the examples of each split; their images stay encoded, as PNG or JPEG.

    Raises ValueError for another number of examples than TFDS wrote, and TFDS's errors, also where
    only TensorFlow can read the files.
    """
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_from_directory(folder)
    info = builder.info
    decoders = dict(image=tensorflow_datasets.decode.SkipDecoding())
    parse = functools.partial(info.features.deserialize_example_np, decoders=decoders)
    splits = []
    for name in names:
        split = info.splits[name]
        if info.file_format is tensorflow_datasets.core.FileFormat.TFRECORD:
            found = tfrecord.Examples(split.filepaths, split.shard_lengths, parse)
        else:
            found = builder.as_data_source(name, decoders=decoders)
        if len(found) != split.num_examples:
            raise ValueError(
                f"{name} holds {len(found):,} examples, but {INFO} names {split.num_examples:,}"
            )
        splits.append(found)
    return splits


def class_names_of(features: Mapping) -> tuple[str, ...]:
    """Return the class names. Raises ValueError without `image` and `label`."""
    from tensorflow_datasets import features as kinds

    found = dict(features) if isinstance(features, kinds.FeaturesDict) else {}
    for feature, kind in dict(image=kinds.Image, label=kinds.ClassLabel).items():
        if not isinstance(found.get(feature), kind):
            raise ValueError(
                f"has the features {', '.join(sorted(found)) or features}, expected image (an "
                "Image) and label (a ClassLabel)"
            )
    return tuple(found["label"].names)


def split_names(splits: Sequence[str], where: str) -> tuple[str, str]:
    """Return the splits to train and to test on. Raises ValueError without them."""
    tests = [name for name in ("validation", "test") if name in splits]
    if "train" not in splits or not tests:
        raise ValueError(
            f"has the splits {', '.join(sorted(splits))}, expected train, and validation or test"
        )
    if len(tests) > 1:
        logging.warning("%s: tests on the split validation; the split test is not used.", where)
    return "train", tests[0]


def make_split(examples: Sequence[dict], name: str, fingerprint: str) -> Split:
    """Return a split of TFDS's `examples`: an encoded image and a label each."""

    def read(i: int) -> Photograph:
        example = examples[i]
        return Photograph(f"{name}[{i}]", io.BytesIO(example["image"]), int(example["label"]))

    keys = [key_of(f"{name} {i} {fingerprint}".encode()) for i in range(len(examples))]
    return Split(len(examples), read, np.array(keys, np.uint64))


def digests_of(folder: Path) -> tuple[str, str]:
    """Return content and fingerprint of TFDS's files, as Source has them."""
    files = [(path, path.stat()) for path in sorted(folder.iterdir())]
    sizes = str([(path.name, status.st_size) for path, status in files])
    identities = [identity_of(os.path.realpath(path), status) for path, status in files]
    content = hashlib.sha256(sizes.encode()).hexdigest()[:8]
    return content, hashlib.sha256(b"".join(identities)).hexdigest()[:16]
