"""Find CIFAR-10 on disk or download it, and read it.

It may be the official archive, the folder that this unpacks to, or what TFDS has prepared. All
give equal arrays. Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images";
https://www.cs.toronto.edu/~kriz/cifar.html
"""

import functools
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cnn_spmd.data import cifar10_archive, digest, prepared, tfds
from cnn_spmd.data.network import Unreachable, probe
from cnn_spmd.errors import UserError, one_line

REMEDY = (
    f"give {cifar10_archive.ARCHIVE} or the folder {cifar10_archive.FOLDER} by "
    "--config.data.dir=PATH"
)


def find(data_dir: str) -> Path:
    """Return where CIFAR-10 is, for `read`; nothing is read yet.

    data_dir: the archive, the folder cifar-10-batches-bin, a folder that holds one of them, a TFDS
    data directory in which TFDS has prepared `cifar10`, or that folder in it. "": the arrays of the
    official archive that an earlier run has kept, what TFDS has prepared in its usual data
    directory, or the official archive, which is downloaded.

    Raises UserError for a wrong data_dir, and Unreachable where the download fails.
    """
    if data_dir:
        try:
            return cifar10_archive.find(data_dir)
        except UserError:
            root = Path(data_dir).expanduser()
            for parent in (root, root.parent, root.parent.parent):  # root may be cifar10/3.0.2
                folder = tfds.prepared_folder("cifar10", parent)
                if folder is not None and folder.is_relative_to(root):
                    return folder
            raise
    kept = kept_folder("official")
    return kept if kept.is_dir() else find_elsewhere()


def is_here(data_dir: str) -> bool:
    """Return whether CIFAR-10 is on disk in a form that is read without TFDS; see `find`."""
    if not data_dir:
        return kept_folder("official").is_dir()
    try:
        cifar10_archive.find(data_dir)
    except UserError:
        return False
    return True


def find_elsewhere() -> Path:
    """Return what TFDS has prepared in its data directory, or the archive, downloaded."""
    return tfds.prepared_folder("cifar10", tfds.data_directory()) or download()


def read(source: Path) -> prepared.Prepared:
    """Return CIFAR-10's arrays, in the archive's order, and their digest.

    source: of `find`. Unpacking the archive and decoding TFDS's images take seconds. So these
    arrays are kept in TFDS's data directory, in a folder that the source's content names: another
    archive never gets them. They are compared with their digest when they are read again. Raises
    UserError for a missing, damaged or wrong source.
    """
    if source == kept_folder("official"):
        return prepared.keep(source, replace_damaged, "CIFAR-10")
    if source.is_dir() and not is_of_tfds(source):
        statuses = [(path.name, path.stat()) for path in sorted(source.iterdir()) if path.exists()]
        stamp = tuple((name, status.st_mtime_ns, status.st_size) for name, status in statuses)
        return _read_folder(source, stamp)
    # What TFDS has prepared is the official archive, or it is refused.
    name = "official" if is_of_tfds(source) else cifar10_archive.fingerprint(source)
    make = functools.partial(decode, source)
    return prepared.keep(kept_folder(name), make, f"CIFAR-10 of {source}")


@functools.lru_cache(maxsize=1)  # the runs of a sweep share a process, and mostly their data
def _read_folder(source: Path, _: tuple) -> prepared.Prepared:
    """Read the unpacked archive; the second argument changes when a file does."""
    return prepared.with_digest(cifar10_archive.read(source))


def is_of_tfds(source: Path) -> bool:
    """Return whether TFDS has prepared a folder."""
    return (source / tfds.INFO).is_file()


def decode(source: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an archive, or of what TFDS has prepared."""
    return read_tfds(source) if is_of_tfds(source) else cifar10_archive.read(source)


def kept_folder(name: str) -> Path:
    """Return where the arrays of a source are kept."""
    return tfds.data_directory() / "cnn_spmd_cifar10" / f"{name}-arrays"


def replace_damaged() -> dict[str, np.ndarray]:
    """Return the official archive's arrays from elsewhere. Raises UserError without a source."""
    try:
        return decode(find_elsewhere())
    except Unreachable as error:
        folder = kept_folder("official")
        raise UserError(f"{folder}: is damaged, and {error}; {REMEDY}") from error


def read_tfds(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of what TFDS has prepared, as cifar10_archive.read does.

    TFDS shuffles the images. Each has an id, such as "train_00042", which numbers the archive's
    order. Raises UserError where the data set is damaged, where its pixels are not CIFAR-10's, and
    where only TensorFlow can read its files.
    """
    examples = cifar10_archive.examples()
    arrays = {}
    try:
        for split, found in zip(examples, tfds.open_splits(folder, list(examples)), strict=True):
            n = examples[split]
            images = arrays[f"{split}_images"] = np.empty((n, *cifar10_archive.SHAPE_HWC), np.uint8)
            labels = arrays[f"{split}_labels"] = np.full(n, -1, np.int32)
            for example in found:
                i = int(example["id"].decode().removeprefix(f"{split}_"))
                images[i] = Image.open(io.BytesIO(example["image"]), formats=["PNG"])
                labels[i] = example["label"]
            if len(found) != n or labels.min() < 0:
                raise ValueError(f"{split} has {len(found):,} images, expected {n:,}, each once")
        if digest.of_arrays(arrays) != cifar10_archive.DIGEST:
            raise ValueError("its pixels or labels are not those of CIFAR-10")
    except Exception as error:  # array_record, protobuf, Pillow and TFDS each raise their own
        remedy = tfds.how_to_build("cifar10", folder.parent.parent)
        raise UserError(
            f"{folder}: cannot be read ({one_line(error)}); delete this folder, and {remedy}; or "
            f"{REMEDY}"
        ) from error
    return arrays


def download() -> Path:
    """Return the official archive, downloaded by TFDS to its data directory.

    Raises Unreachable where that fails, also by another content, and UserError where the directory
    cannot be written.
    """
    probe(cifar10_archive.URL)
    import requests  # importing these takes a second
    import tensorflow_datasets

    if not sys.stderr.isatty():
        tensorflow_datasets.disable_progress_bar()
    expected = tensorflow_datasets.download.checksums.UrlInfo(
        size=cifar10_archive.ARCHIVE_BYTES,
        checksum=cifar10_archive.ARCHIVE_SHA256,
        filename=cifar10_archive.ARCHIVE,
    )
    root = tfds.data_directory()
    print(f"downloading {cifar10_archive.URL} to {root}, once", file=sys.stderr)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with prepared.exclusive(root / "cnn_spmd_cifar10", "CIFAR-10"):
            manager = tensorflow_datasets.download.DownloadManager(
                download_dir=root / "downloads",
                url_infos={cifar10_archive.URL: expected},
                dataset_name="cifar10",
            )
            return Path(manager.download(cifar10_archive.URL))  # of another run, where it is there
    except (
        requests.RequestException,
        tensorflow_datasets.download.DownloadError,
        tensorflow_datasets.download.download_manager.NonMatchingChecksumError,
    ) as error:
        raise Unreachable(
            f"the download of {cifar10_archive.URL} failed ({one_line(error)})"
        ) from error
    except OSError as error:
        raise UserError(
            f"TFDS_DATA_DIR={root}: cannot download CIFAR-10 to it ({one_line(error)}); choose "
            "a directory that can be written and has 400 MB of room"
        ) from error
