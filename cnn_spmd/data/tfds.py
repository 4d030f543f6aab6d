"""Find data sets that TFDS (tensorflow_datasets) has prepared, or have it prepare them.

TFDS itself is imported only where its files are read or made: that takes a second.
"""

import difflib
import functools
import hashlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from cnn_spmd.data import prepared, tfrecord
from cnn_spmd.data.folder import identity_of
from cnn_spmd.data.network import probe
from cnn_spmd.data.progress import print_note
from cnn_spmd.data.source import Photograph, Source, Split, key_of
from cnn_spmd.data.split import hold_out_photographs
from cnn_spmd.errors import UserError, one_line

PREFIX = "tfds:"  # of a data.name that TFDS may download and prepare
# What may follow it, and what TFDS calls its data sets: NAME, NAME/CONFIG, NAME:VERSION.
NAMES = re.compile(r"[^\W\d]\w*(/\w[\w.+-]*)?(:\d+\.\d+\.\d+)?")
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
    """Return where TFDS has prepared a data set, its last version, or None.

    name: as NAMES.
    """
    if not NAMES.fullmatch(name):
        return None
    found = sorted(path.parent for path in root.joinpath(*re.split("[/:]", name)).rglob(INFO))
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

    name: as NAMES; after PREFIX, TFDS downloads and prepares what is not there. The data set trains
    on the split `train`, and tests on `validation`, or on `test` where there is none, or on a part
    of `train`. Raises UserError, with the command that prepares it, where it is missing, damaged,
    without images and labels, or in a file format that needs TensorFlow.
    """
    bare = name.removeprefix(PREFIX)
    remedy = (
        f"{how_to_build(bare, root)}; or give its images in class folders by "
        "--config.data.name=folder --config.data.dir=DIR (train/CLASS/*, val/CLASS/*)"
    )
    folder = prepared_folder(bare, root)
    if folder is None:
        if name == bare:
            raise UserError(f"data.name={name}: {root / name} holds no prepared data set: {remedy}")
        folder = prepare(name, root, remedy)
    import tensorflow_datasets

    where = f"data.name={name}: {folder}"
    try:
        info = tensorflow_datasets.builder_from_directory(folder).info
        features = choose_features(info, f"data.name={name}")
        class_names = tuple(info.features[features.label].names)
        names = split_names(info.splits, where)
        examples = open_splits(folder, names)
    except UserError:
        raise
    except Exception as error:
        # TFDS raises many types for another file format, a missing split, a damaged file.
        raise UserError(f"{where} cannot be read ({one_line(error)}): {remedy}") from error
    if features.unused:
        unused = ", ".join(features.unused)
        logging.warning("%s: its labels are %s; not used: %s.", where, features.label, unused)
    content, fingerprint = digests_of(folder)
    splits = {
        split: make_split(found, split_name, fingerprint, features)
        for split, found, split_name in zip(("train", "test"), examples, names, strict=False)
    }
    is_held_out = "test" not in splits
    if is_held_out:  # whatever their classes: reading those of a large data set takes minutes
        splits = hold_out_photographs(splits["train"], np.zeros(len(examples[0])), where)
    return Source(
        str(folder), splits, class_names, content, fingerprint, is_held_out, features.side
    )


def prepare(name: str, root: Path, remedy: str) -> Path:
    """Return the folder of a data set, PREFIX and a name, that TFDS downloads and prepares.

    Raises UserError for a name that TFDS does not know, for features that do not fit, both before
    anything is downloaded, and with `remedy` where TFDS cannot download or prepare it.
    """
    import tensorflow_datasets

    builder = find_builder(name, root)
    choose_features(builder.info, f"data.name={name}")
    if not sys.stderr.isatty():
        tensorflow_datasets.disable_progress_bar()
    bare = name.removeprefix(PREFIX)
    try:
        if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:  # otherwise its files are here, or nowhere
            urls = [url for url in builder.url_infos or () if url.startswith("http")]
            for url in urls[:1]:
                probe(url)
        root.mkdir(parents=True, exist_ok=True)
        with prepared.exclusive(root / re.sub(r"\W", "-", f"cnn_spmd_{bare}"), name):
            note = f"downloading and preparing {name} in {root}, once"
            if importlib.util.find_spec("tensorflow") is None:
                note += "; TensorFlow, which many data sets need for that, is not installed"
            print_note(note)
            builder.download_and_prepare()  # does nothing if another run has done it
    except Exception as error:  # TFDS, requests, and the code of each data set raise many types
        text = str(error) if isinstance(error, UserError) else one_line(error)
        raise UserError(
            f"data.name={name}: cannot be downloaded and prepared ({text}): {remedy}"
        ) from error
    return Path(builder.data_dir)


def is_in_catalog(name: str) -> bool:
    """Return whether TFDS can prepare a data set; name: as NAMES."""
    import tensorflow_datasets

    known = tensorflow_datasets.list_builders(with_community_datasets=False)
    return re.split("[/:]", name)[0] in known


def find_builder(name: str, root: Path) -> Any:
    """Return what TFDS prepares a data set with. Raises UserError for an unknown name."""
    import tensorflow_datasets

    bare = name.removeprefix(PREFIX)
    expected = f"expected {PREFIX} and a name of https://www.tensorflow.org/datasets/catalog"
    if not NAMES.fullmatch(bare):
        raise UserError(f"data.name={name}: {expected}, such as {PREFIX}oxford_flowers102")
    try:
        return tensorflow_datasets.builder(bare, data_dir=root, file_format="array_record")
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        near = [f"{PREFIX}{each}" for each in difflib.get_close_matches(bare.lower(), known, 3)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"data.name={name}: TFDS knows no such data set, {expected}{hint}"
        ) from error
    except Exception as error:  # several types, for an unknown version or configuration
        reason = str(error).rpartition('": ')[2]  # TFDS puts its own arguments before it
        raise UserError(
            f"data.name={name}: {' '.join(reason.split())[:200]}, {expected}"
        ) from error


def open_splits(folder: Path, names: Sequence[str]) -> list[Sequence[dict]]:
    """Return the examples of each split; all their images stay encoded, as PNG or JPEG.

    Raises ValueError for another number of examples than TFDS wrote, and TFDS's errors, also where
    only TensorFlow can read the files.
    """
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_from_directory(folder)
    info = builder.info
    decoders = {
        feature: tensorflow_datasets.decode.SkipDecoding()
        for feature, kind in info.features.items()
        if isinstance(kind, tensorflow_datasets.features.Image)
    }
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


class Features(NamedTuple):
    """The features of a data set that are used."""

    image: str
    label: str
    unused: Sequence[str]  # other labels
    side: int  # of each image, in pixels, where all are squares of one size; otherwise 0


def choose_features(info: Any, where: str) -> Features:
    """Return which features of TFDS's `info` are the images and their labels.

    Those are info.supervised_keys, or the ones called `image` and `label`, or the only ones of
    their kinds. Raises UserError without such features.
    """
    from tensorflow_datasets import features as kinds

    is_dict = isinstance(info.features, kinds.FeaturesDict)
    features = dict(sorted(info.features.items())) if is_dict else {}
    keys = info.supervised_keys if len(info.supervised_keys or ()) == 2 else (None, None)
    image, *_ = choose_feature(features, kinds.Image, (keys[0], "image"), where)
    label, *unused = choose_feature(features, kinds.ClassLabel, (keys[1], "label"), where)
    height, width, _ = features[image].shape
    return Features(image, label, unused, side=height if height and height == width else 0)


def choose_feature(features: Mapping, kind: type, preferred: Sequence, where: str) -> list[str]:
    """Return the features of a kind: the first of `preferred` that is one, then the others.

    Raises UserError where there is none, or several and none of them is preferred.
    """
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found
    for name in preferred:
        if name in found:
            return [name, *(other for other in found if other != name)]
    if found:
        raise UserError(
            f"{where}: has several features of the kind {kind.__name__} ({', '.join(found)}), "
            "expected one: choose it in a loader of your own (docs/extending.md, A data set)"
        )
    raise UserError(
        f"{where}: has no {kind.__name__} among its features ({', '.join(features)}), expected a "
        "data set of images with a label each"
    )


def split_names(splits: Sequence[str], where: str) -> list[str]:
    """Return the split to train on, and that to test on where there is one.

    Raises ValueError without the former.
    """
    if "train" not in splits:
        raise ValueError(f"has the splits {', '.join(sorted(splits))}, expected train")
    tests = [name for name in ("validation", "test") if name in splits]
    if len(tests) > 1:
        logging.warning("%s: tests on the split validation; the split test is not used.", where)
    return ["train", *tests[:1]]


def make_split(examples: Sequence[dict], name: str, fingerprint: str, features: Features) -> Split:
    """Return a split of TFDS's `examples`: an encoded image and a label each."""

    def read(i: int) -> Photograph:
        example = examples[i]
        file, label = io.BytesIO(example[features.image]), int(example[features.label])
        return Photograph(f"{name}[{i}]", file, label)

    keys = [key_of(f"{name} {i} {fingerprint}".encode()) for i in range(len(examples))]
    return Split(len(examples), read, np.array(keys, np.uint64))


def digests_of(folder: Path) -> tuple[str, str]:
    """Return content and fingerprint of TFDS's files, as Source has them."""
    files = [(path, path.stat()) for path in sorted(folder.iterdir())]
    sizes = str([(path.name, status.st_size) for path, status in files])
    identities = [identity_of(os.path.realpath(path), status) for path, status in files]
    content = hashlib.sha256(sizes.encode()).hexdigest()[:8]
    return content, hashlib.sha256(b"".join(identities)).hexdigest()[:16]
