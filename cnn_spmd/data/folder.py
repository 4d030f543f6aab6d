"""Data sets of photographs: class folders (DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg), or what TFDS has prepared."""

import functools
import hashlib
import io
import os
import stat
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from cnn_spmd.data import prepared
from cnn_spmd.data.prepared import Prepared, Source, Split
from cnn_spmd.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LAYOUT = (
    "expected a folder that holds train/CLASS/*.jpg (or .jpeg, .png, .webp) and val/CLASS/* "
    "(or test/CLASS/*)"
)
CLASSES = dict(imagenet2012=1000, imagenette=10)  # TFDS's data sets, and how many classes they have
FORM = "2"  # of the prepared files; another one prepares them anew


def load(
    name: str,
    data_dir: str,
    size: int,
    check: Callable[[Source, Prepared], object],
    skip_bad: int = 0,
) -> tuple[Source, Prepared]:
    """The data set as it was found, and its arrays (prepared.arrays_of, images of size x size).

    name: "folder", or one of CLASSES; data_dir: class folders, or for the latter also TFDS's data directory ("": the usual
    one). The first call prepares the arrays in TFDS's data directory ($TFDS_DATA_DIR or ~/tensorflow_datasets), once `check`
    has seen the data set and zeros for its arrays; later calls find them by the files' `identity`.

    Raises UserError, in one line, for what is missing, damaged or of another form.
    """
    root = Path(tfds.core.constants.get_default_data_dir()).expanduser()
    given = Path(data_dir).expanduser() if data_dir else root
    if name == "folder" and not data_dir:
        raise UserError(f"data.dir=: is empty, {LAYOUT}")
    if data_dir and not os.path.isdir(given):
        raise UserError(f"data.dir={data_dir}: is no folder, {LAYOUT}")
    source = (
        from_folders(given)
        if name == "folder" or os.path.isdir(given / "train")
        else from_tfds(name, given)
    )
    found, expected = len(source.class_names), CLASSES.get(name)
    if expected not in (None, found):
        raise UserError(
            f"data.dir={data_dir}: holds {found} classes, but data.name={name} has {expected}: give another "
            "folder, or data.name=folder"
        )
    return source, prepared.arrays_of(
        source, size, root / "cnn_spmd_photographs", functools.partial(check, source), skip_bad
    )


def from_folders(root: Path) -> Source:
    """The class folders in `root`: train/CLASS/* to train on, val/CLASS/* (or else test/CLASS/*) to test on.

    Raises UserError naming what is missing or empty, a class that only one of the two has, and a file that cannot be read.
    """
    where = f"data.dir={root}"
    try:
        folders = [
            next((root / name for name in names if (root / name).is_dir()), None)
            for names in (("train",), ("val", "test"))
        ]
        if None in folders:
            raise UserError(
                f"{where}: holds no {'val/ or test/' if folders[0] else 'train/'}, {LAYOUT}"
            )
        seen = [
            [entry for entry in os.scandir(folder) if entry.name[0] != "."] for folder in folders
        ]
        classes, others = ({entry.name for entry in entries if entry.is_dir()} for entries in seen)
        other = [entry.path for entries in seen for entry in entries if not entry.is_dir()]
        refuse_classes(where, folders, seen, classes, others)
        content, files_are, splits = hashlib.sha256(), hashlib.sha256(), {}
        for split, folder in zip(("train", "test"), folders, strict=True):
            files, labels, keys, real = [], [], [], os.path.realpath(folder)
            for label, name in enumerate(sorted(classes)):
                before = len(files)
                for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name):
                    if entry.name[0] == ".":
                        continue
                    if entry.is_dir() or not entry.name.lower().endswith(SUFFIXES):
                        other.append(entry.path)
                        continue
                    status = entry.stat()
                    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
                        raise UserError(
                            f"{where}: {entry.path}: is no regular file, expected images"
                        )
                    files.append(entry.path)
                    content.update(os.fsencode(f"{split}/{name}/{entry.name}\0{status.st_size}\0"))
                    this = identity(f"{real}/{name}/{entry.name}", status)
                    files_are.update(this)
                    keys.append(prepared.key_of(b"%d %b" % (label, this)))
                labels += [label] * (len(files) - before)
                if len(files) == before:
                    raise UserError(
                        f"{where}: {folder.name}/{name}/ holds no image ({', '.join(SUFFIXES)}), expected at least "
                        "one in each class"
                    )
            splits[split] = Split(
                len(files),
                lambda i, files=files, labels=labels: (files[i], Path(files[i]), labels[i]),
                np.array(keys, np.uint64),
            )
    except OSError as error:
        raise UserError(
            f"{where}: {error.filename}: {error.strerror}, expected readable folders and files"
        ) from error
    if other:
        logging.warning(
            "%s: left out, as no %s in a class folder: %s%s.",
            where,
            "/".join(SUFFIXES),
            other[0],
            f" and {len(other) - 1} more" if len(other) > 1 else "",
        )
    class_names = tuple(
        os.fsencode(name).decode(errors="replace") for name in sorted(classes)
    )  # which can be drawn
    fingerprint = files_are.hexdigest()[:16]
    return Source(str(root), splits, class_names, content.hexdigest()[:8], fingerprint)


def refuse_classes(
    where: str,
    folders: list[Path],
    seen: list[list[os.DirEntry]],
    classes: set[str],
    others: set[str],
) -> None:
    """Raises UserError where train and val hold other classes, or none.

    folders: the two; seen: what is in each; classes, others: the names of class folders in each.
    """
    for folder, names, entries in zip(folders, (classes, others), seen, strict=True):
        if not names and any(entry.name.lower().endswith(SUFFIXES) for entry in entries):
            raise UserError(
                f"{where}: {folder.name}/ holds images but no class folders, expected "
                f"each image in the folder of its class, {folder.name}/CLASS/*"
            )
    for name in sorted(classes ^ others):
        has, lacks = folders if name in classes else folders[::-1]
        alike = alike_name(name, others if name in classes else classes)
        raise UserError(
            f"{where}: class {name!r} is in {has.name}/ but not in "
            f"{lacks.name}/{alike}, expected the same in both"
        )
    if not classes:
        first, second = (folder.name for folder in folders)
        raise UserError(f"{where}: {first}/ and {second}/ hold no class folders, {LAYOUT}")


def identity(path: str, status: os.stat_result) -> bytes:
    """Gives what changes with a file's content, and for another file; path: a real one.

    Names, sizes and times of modification can be equal by a copy or by `touch`; nobody can set the
    time of the last change of the inode. The device's number is left out: on a network file system
    it is another one after each mount.
    """
    times = status.st_mtime_ns, status.st_ctime_ns
    return os.fsencode(f"{FORM}\0{path}\0{status.st_size}\0{times}\0{status.st_ino}\0")


def alike_name(name: str, others: set[str]) -> str:
    """Says which class in `others` looks like `name`, and how they differ; "" for none.

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


def from_tfds(name: str, root: Path) -> Source:
    """TFDS's data set `name` as `tfds build` has prepared it in `root`; of several versions the last.

    Raises UserError, with the command that prepares it, where it is missing, damaged or in files without random access.
    """
    manual = (
        "; put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org into MANUAL"
        if name == "imagenet2012"
        else ""
    )
    config = "/full-size-v2" if name == "imagenette" else ""  # one of six
    build = (
        f"prepare it, where TensorFlow is installed too, by: tfds build {name}{config} --file_format=array_record "
        f"--data_dir={root}{' --manual_dir=MANUAL' if manual else ''}{manual}; or give its images in class folders by "
        "--config.data.dir=DIR (train/CLASS/*, val/CLASS/*)"
    )
    found = sorted(path.parent for path in (root / name).rglob("dataset_info.json"))
    if not found:
        raise UserError(f"data.name={name}: {root / name} holds no prepared data set: {build}")
    try:
        builder = tfds.builder_from_directory(found[-1])
        examples = [
            builder.as_data_source(split, decoders=dict(image=tfds.decode.SkipDecoding()))
            for split in ("train", "validation")
        ]
        class_names = tuple(builder.info.features["label"].names)
    except (
        Exception
    ) as error:  # TFDS raises many kinds for another file format, a missing split, a damaged file
        raise UserError(
            f"data.name={name}: {found[-1]} cannot be read ({prepared.one_line(error)}): {build}"
        ) from error

    def split(split_name, examples):
        def read(i: int) -> tuple[str, io.BytesIO, int]:
            example = examples[i]
            return f"{split_name}[{i}]", io.BytesIO(example["image"]), int(example["label"])

        names = (f"{split_name} {i} {fingerprint}" for i in range(len(examples)))
        keys = np.array([prepared.key_of(name.encode()) for name in names], np.uint64)
        return Split(len(examples), read, keys)

    files = [(path, path.stat()) for path in sorted(found[-1].iterdir())]
    names = str([(path.name, status.st_size) for path, status in files])
    content = hashlib.sha256(names.encode()).hexdigest()[:8]
    identities = [identity(os.path.realpath(path), status) for path, status in files]
    fingerprint = hashlib.sha256(b"".join(identities)).hexdigest()[:16]
    return Source(
        str(found[-1]),
        dict(train=split("train", examples[0]), test=split("validation", examples[1])),
        class_names,
        content,
        fingerprint,
    )
