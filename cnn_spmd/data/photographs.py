"""Load photographs, from class folders or TFDS, as squares of one size."""

from pathlib import Path

import ml_collections

from cnn_spmd.config import IMAGE_SIZE
from cnn_spmd.data import folder, prepared, tfds
from cnn_spmd.data.dataset import Dataset, Found, Unread
from cnn_spmd.data.source import Source
from cnn_spmd.errors import UserError

# The data sets of TFDS that may also be given in class folders, and their numbers of classes.
CLASSES = dict(imagenet2012=1000, imagenette=10)


def load(data: ml_collections.ConfigDict) -> Found:
    """Return the photographs of config.data, decoded if an earlier run did so.

    data.name: "folder", one of CLASSES, another name of TFDS, or "tfds:" and any name of TFDS;
    data.dir: the class folders, or TFDS's data directory ("": the usual one). The decoded images go
    to TFDS's data directory.

    Raises UserError, in one line, for what is missing, damaged or of another form.
    """
    name, skip_bad = data.name, data.get("skip_bad", 0)
    source = find_source(name, data.dir)
    # Under a bare name, runs have always had images of IMAGE_SIZE, and resume with these.
    own_side = source.side if name.startswith(tfds.PREFIX) else 0
    size = data.image_size or own_side or IMAGE_SIZE
    root = tfds.data_directory() / "cnn_spmd_photographs"
    found = prepared.find(source, size, root, skip_bad)
    if found is not None:
        return make_dataset(name, source, found)
    return Unread(
        preview=make_dataset(name, source, prepared.preview(source, size)),
        read=lambda: make_dataset(name, source, prepared.prepare(source, size, root, skip_bad)),
    )


def find_source(name: str, data_dir: str) -> Source:
    """Return the data set as it is found. Raises UserError as `load`."""
    if name == "folder" and not data_dir:
        raise UserError(f"data.dir=: is empty, {folder.LAYOUT}")
    root = root_of(data_dir)
    if data_dir and not root.is_dir():
        raise UserError(f"data.dir={data_dir}: is no folder, {folder.LAYOUT}")
    if is_in_folders(name, data_dir):
        source = folder.find_source(root)
    else:
        source = tfds.find_source(name, root)
    found, expected = len(source.class_names), CLASSES.get(name)
    if expected not in (None, found):
        raise UserError(
            f"data.dir={data_dir}: holds {found} classes, but data.name={name} has {expected}: "
            "give another folder, or data.name=folder"
        )
    return source


def root_of(data_dir: str) -> Path:
    """Return the folder that data.dir stands for."""
    return Path(data_dir).expanduser() if data_dir else tfds.data_directory()


def is_in_folders(name: str, data_dir: str) -> bool:
    """Return whether photographs are in class folders; otherwise they are TFDS's."""
    return name == "folder" or (name in CLASSES and (root_of(data_dir) / "train").is_dir())


def make_dataset(name: str, source: Source, found: prepared.Prepared) -> Dataset:
    """Return decoded images, or zeros that stand for them, as a Dataset.

    A data set of class folders is named after its files. A named one records their digest.
    """
    is_folder = name == "folder"
    return Dataset(
        name=f"folder-{source.content}" if is_folder else name,
        **found.arrays,
        class_names=source.class_names,
        files="" if is_folder else source.content,
        digest=found.digest,
        skipped=len(found.skipped),
        test_from_train=len(found.arrays["test_labels"]) if source.is_held_out else 0,
    )
