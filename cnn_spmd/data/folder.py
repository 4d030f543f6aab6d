"""Find photographs in class folders.

DIR/train/CLASS/* are to train on, DIR/val/CLASS/* or DIR/test/CLASS/* to test on. Without the
latter, or with DIR/CLASS/* alone, a part of the photographs is held out to test on.
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
from cnn_spmd.data.split import hold_out_photographs
from cnn_spmd.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LAYOUT = (
    "expected a folder that holds train/CLASS/*.jpg (or .jpeg, .png, .webp) and val/CLASS/* "
    "(or test/CLASS/*), or CLASS/*.jpg alone"
)
TEST_FOLDERS = ("val", "valid", "validation", "test")  # what to test on is in the first of these
# The version of the prepared files' format. Another one makes every data set be prepared anew.
FORM = "2"


class Folder(NamedTuple):
    """The folder of one split, and what lies in it."""

    path: Path
    classes: set[str]  # names of the class folders
    others: list[str]  # paths of what is no folder


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
        folders = {split: list_folder(path) for split, path in split_folders(root, where).items()}
        refuse_classes(where, list(folders.values()))
        classes = sorted(folders["train"].classes)
        # A name in another encoding than UTF-8 becomes one that a plot can show.
        names = tuple(os.fsencode(name).decode(errors="replace") for name in classes)
        left_out, splits = [], {}
        for split, folder in folders.items():
            images, keys, others = list_images(folder.path, classes, split, digests, where)
            splits[split] = Split(len(images), images.__getitem__, np.array(keys, np.uint64))
            left_out += folder.others + others
        is_held_out = "test" not in splits
        if is_held_out:
            labels = np.take(names, [image.label for image in images])
            splits = hold_out_photographs(splits["train"], labels, where)
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
    content, fingerprint = (each.hexdigest() for each in (digests.content, digests.fingerprint))
    return Source(str(root), splits, names, content[:8], fingerprint[:16], is_held_out)


def split_folders(root: Path, where: str) -> dict[str, Path]:
    """Return the folder of "train", and that of "test" where there is one.

    Class folders in `root` itself are to train on. Raises UserError where nothing is.
    """
    tests = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    train = root / "train"
    if not train.is_dir():
        if tests or not any(path.suffix.lower() in SUFFIXES for path in root.glob("*/*")):
            raise UserError(f"{where}: holds no train/, {LAYOUT}")
        train = root
    if len(tests) > 1:
        first, *others = (f"{path.name}/" for path in tests)
        found = " and ".join((first, *others))
        logging.warning(
            "%s: holds %s: %s is used, %s is not.", where, found, first, " and ".join(others)
        )
    return dict(train=train, test=tests[0]) if tests else dict(train=train)


def list_folder(path: Path) -> Folder:
    """Return what lies in the folder of a split, without hidden files."""
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    classes = {entry.name for entry in entries if entry.is_dir()}
    return Folder(path, classes, [entry.path for entry in entries if not entry.is_dir()])


def list_images(
    folder: Path, classes: Sequence[str], split: str, digests: Digests, where: str
) -> tuple[list[Photograph], list[int], list[str]]:
    """Return the images of a split, key_of each, and paths of what is no image.

    The images are sorted by class and name, and added to `digests`. Raises UserError for a class
    without images and for an image that is no regular file.
    """
    images, keys, others = [], [], []
    real_folder = os.path.realpath(folder)
    for label, name in enumerate(classes):
        before = len(images)
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
            images.append(Photograph(entry.path, entry.path, label))
            keys.append(key_of(b"%d %b" % (label, identity)))
        if len(images) == before:
            raise UserError(
                f"{where}: {folder.name}/{name}/ holds no image ({', '.join(SUFFIXES)}), expected "
                "at least one in each class"
            )
    return images, keys, others


def refuse_classes(where: str, folders: Sequence[Folder]) -> None:
    """Raise UserError where the folders of the splits hold different classes, or fewer than two."""
    for folder in folders:
        holds_images = any(path.lower().endswith(SUFFIXES) for path in folder.others)
        if holds_images and not folder.classes:
            name = folder.path.name
            raise UserError(
                f"{where}: {name}/ holds images but no class folders, expected each image in the "
                f"folder of its class, {name}/CLASS/*"
            )
    train, test = folders[0], folders[-1]
    for name in sorted(train.classes ^ test.classes):
        has, lacks = (train, test) if name in train.classes else (test, train)
        raise UserError(
            f"{where}: class {name!r} is in {has.path.name}/ but not in {lacks.path.name}/"
            f"{similar_name(name, lacks.classes)}, expected the same in both"
        )
    if not train.classes:
        found = " and ".join(f"{folder.path.name}/" for folder in folders)
        raise UserError(f"{where}: found no class folders in {found}, {LAYOUT}")
    if len(train.classes) == 1:
        raise UserError(f"{where}: holds one class, {min(train.classes)}, expected at least two")


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
