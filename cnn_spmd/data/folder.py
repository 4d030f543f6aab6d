"""Find photographs in class folders.

DIR/train/CLASS/* are to train on, DIR/val/CLASS/* or DIR/test/CLASS/* to test on.
"""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from cnn_spmd.data.source import Photograph, Source, Split, key_of
from cnn_spmd.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LAYOUT = (
    "expected a folder that holds train/CLASS/*.jpg (or .jpeg, .png, .webp) and val/CLASS/* "
    "(or test/CLASS/*)"
)
# The version of the prepared files' format. Another one makes every data set be prepared anew.
FORM = "2"


class Folder(NamedTuple):
    """The folder of one split, and what lies in it."""

    path: Path
    classes: set[str]  # names of the class folders
    others: list[str]  # paths of what is no folder


class Images(NamedTuple):
    """The images of one split, sorted by class and name."""

    paths: list[str]
    labels: list[int]
    keys: list[int]  # key_of each

    def to_split(self) -> Split:
        """Return them as a part of a Source."""

        def read(i: int) -> Photograph:
            return Photograph(self.paths[i], Path(self.paths[i]), self.labels[i])

        return Split(len(self.paths), read, np.array(self.keys, np.uint64))


class Digests:
    """The digests of a data set's files, as Source has them, updated file by file."""

    def __init__(self):
        self.content = hashlib.sha256()
        self.fingerprint = hashlib.sha256()

    def add(self, split: str, folder: str, place: str, status: os.stat_result) -> bytes:
        """Add a file, and return its identity.

        folder: the split's, without symbolic links; place: the file's below it, CLASS/FILE.
        """
        identity = identity_of(f"{folder}/{place}", status)
        self.content.update(os.fsencode(f"{split}/{place}\0{status.st_size}\0"))
        self.fingerprint.update(identity)
        return identity


def find_source(root: Path) -> Source:
    """Return the photographs in the class folders of `root`; nothing is decoded.

    Logs which files are left out. Raises UserError naming what is missing or empty, a class that
    only one split has, and a file that cannot be read.
    """
    where = f"data.dir={root}"
    digests = Digests()
    try:
        train, test = (list_folder(path) for path in split_folders(root, where))
        refuse_classes(where, train, test)
        classes = sorted(train.classes)
        left_out = train.others + test.others
        splits = {}
        for split, folder in (("train", train), ("test", test)):
            images, others = list_images(folder.path, classes, split, digests, where)
            splits[split] = images.to_split()
            left_out += others
    except OSError as error:
        raise UserError(
            f"{where}: {error.filename}: {error.strerror}, expected readable folders and files"
        ) from error
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        suffixes = "/".join(SUFFIXES)
        logging.warning(
            "%s: left out, as no %s in a class folder: %s%s.", where, suffixes, left_out[0], more
        )
    # A name in another encoding than UTF-8 becomes one that a plot can show.
    names = tuple(os.fsencode(name).decode(errors="replace") for name in classes)
    content = digests.content.hexdigest()[:8]
    return Source(str(root), splits, names, content, digests.fingerprint.hexdigest()[:16])


def split_folders(root: Path, where: str) -> tuple[Path, Path]:
    """Return the folders to train and to test on. Raises UserError without them."""
    train, val, test = (root / name for name in ("train", "val", "test"))
    if not train.is_dir():
        raise UserError(f"{where}: holds no train/, {LAYOUT}")
    if val.is_dir():
        if test.is_dir():
            logging.warning("%s: holds val/ and test/: val/ is used, test/ is not.", where)
        return train, val
    if not test.is_dir():
        raise UserError(f"{where}: holds no val/ or test/, {LAYOUT}")
    return train, test


def list_folder(path: Path) -> Folder:
    """Return what lies in the folder of a split, without hidden files."""
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    classes = {entry.name for entry in entries if entry.is_dir()}
    return Folder(path, classes, [entry.path for entry in entries if not entry.is_dir()])


def list_images(
    folder: Path, classes: Sequence[str], split: str, digests: Digests, where: str
) -> tuple[Images, list[str]]:
    """Return the images in a split's class folders, and paths of what is no image.

    Adds the images to `digests`. Raises UserError for a class without images and for an image that
    is no regular file.
    """
    images, others = Images([], [], []), []
    real_folder = os.path.realpath(folder)
    for label, name in enumerate(classes):
        before = len(images.paths)
        for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir() or not entry.name.lower().endswith(SUFFIXES):
                others.append(entry.path)
                continue
            status = entry.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
                raise UserError(f"{where}: {entry.path}: is no regular file, expected images")
            identity = digests.add(split, real_folder, f"{name}/{entry.name}", status)
            images.paths.append(entry.path)
            images.labels.append(label)
            images.keys.append(key_of(b"%d %b" % (label, identity)))
        if len(images.paths) == before:
            raise UserError(
                f"{where}: {folder.name}/{name}/ holds no image ({', '.join(SUFFIXES)}), expected "
                "at least one in each class"
            )
    return images, others


def refuse_classes(where: str, train: Folder, test: Folder) -> None:
    """Raise UserError where the splits hold different classes, or none."""
    for folder in (train, test):
        holds_images = any(path.lower().endswith(SUFFIXES) for path in folder.others)
        if holds_images and not folder.classes:
            name = folder.path.name
            raise UserError(
                f"{where}: {name}/ holds images but no class folders, expected each image in the "
                f"folder of its class, {name}/CLASS/*"
            )
    for name in sorted(train.classes ^ test.classes):
        has, lacks = (train, test) if name in train.classes else (test, train)
        raise UserError(
            f"{where}: class {name!r} is in {has.path.name}/ but not in {lacks.path.name}/"
            f"{similar_name(name, lacks.classes)}, expected the same in both"
        )
    if not train.classes:
        raise UserError(
            f"{where}: {train.path.name}/ and {test.path.name}/ hold no class folders, {LAYOUT}"
        )


def similar_name(name: str, others: set[str]) -> str:
    """Say which class in `others` looks like `name`, and how they differ; "" for none.

    Some systems write an accented letter as one character (NFC), others as a letter and an accent
    (NFD).
    """
    composed = unicodedata.normalize("NFC", name)
    for other in sorted(others - {name}):
        found = unicodedata.normalize("NFC", other)
        if found.split() == composed.split():
            how = "in Unicode normalisation" if found == composed else "in spaces"
            return f", which has {other!a}: they differ {how} ({name!a})"
    return ""


def identity_of(real_path: str, status: os.stat_result) -> bytes:
    """Return bytes that change with a file's content, and differ for another file.

    Names, sizes and times of modification can be equal after a copy or `touch`. But no program can
    set the time at which the inode last changed. The device's number is left out, because a
    network file system has another one after each mount.
    """
    times = status.st_mtime_ns, status.st_ctime_ns
    return os.fsencode(f"{FORM}\0{real_path}\0{status.st_size}\0{times}\0{status.st_ino}\0")
