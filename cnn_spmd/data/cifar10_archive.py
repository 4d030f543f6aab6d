"""CIFAR-10's binary archive, or the folder it unpacks to: found, fingerprinted, read and checked. No pickle is loaded.

Format: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version". Legend: N images, H = W = 32, C = 3 (RGB).
"""

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from absl import logging

from cnn_spmd.errors import UserError

# The official archive: checksum and size as TFDS keeps them (its url_checksums/cifar10.txt).
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_BYTES = 170_052_171
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

# What it holds: records of one label byte, then 32x32 red, green and blue planes.
FOLDER = "cifar-10-batches-bin"
FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
ALL_FILES = FILES["train"] + FILES["test"]
IMAGES_PER_FILE = 10_000
SHAPE_HWC = (32, 32, 3)
OTHER_VERSIONS = {
    "Python": ("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1"),
    "MATLAB": ("cifar-10-matlab.tar.gz", "cifar-10-batches-mat", "data_batch_1.mat"),
}
RECORD_BYTES = 1 + 32 * 32 * 3
DIGEST = "8f7b01b42d7c5cba"  # data/digest.py, of all its pixels and labels
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def find(data_dir: str) -> Path:
    """The archive, or the folder of batches, that `data_dir` is or holds. Raises UserError where it is neither."""
    path = Path(data_dir).expanduser()
    for archive in (path, path / ARCHIVE):
        if archive.is_file() and archive.name not in sum(OTHER_VERSIONS.values(), ()):
            return archive
    for folder in (path, path / FOLDER):
        if folder.is_dir() and (
            folder.name == FOLDER or any((folder / name).exists() for name in ALL_FILES)
        ):
            return folder
    problem = "holds no CIFAR-10 in its binary version" if path.exists() else "does not exist"
    for version, names in OTHER_VERSIONS.items():
        if path.exists() and any(path.name == name or (path / name).exists() for name in names):
            problem = f"is CIFAR-10 in its {version} version, expected the binary version"
    raise UserError(
        f"data.dir={data_dir}: {problem}; give {ARCHIVE}, the folder {FOLDER}, or a folder holding either"
    )


def fingerprint(source: Path) -> str:
    """The content's name: "official" for the official archive, else "local-" and 12 hex digits of its SHA-256.

    Raises UserError naming the file that is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for path in [source] if source.is_file() else [source / name for name in ALL_FILES]:
        if path.is_fifo():  # to open it would wait for its writer
            raise UserError(f"data.dir={source}: {path.name}: is a pipe; expected a readable file")
        try:
            with path.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
        except OSError as error:
            raise UserError(
                f"data.dir={source}: {path.name}: {error.strerror}; expected a readable file"
            ) from error
    if digest.hexdigest() == ARCHIVE_SHA256:
        return "official"
    if source.is_file():
        logging.warning(
            "data.dir: %s is not the official archive: its sha256 is %s, the official one %s. Using it all "
            "the same.",
            source,
            digest.hexdigest(),
            ARCHIVE_SHA256,
        )
    return f"local-{digest.hexdigest()[:12]}"


def read(source: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train": (images uint8 [N, H, W, C], labels uint8 [N]), "test": ...}, in the files' order.

    Raises UserError naming the file that is missing, damaged, of the wrong size, or wrong.
    """
    records = {
        name: np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
        for name, content in _files(source)
    }
    for name in ALL_FILES:
        if name not in records:
            raise UserError(f"data.dir={source}: lacks {name}; expected {', '.join(ALL_FILES)}")
        if (label := records[name][:, 0].max()) >= len(CLASS_NAMES):
            raise UserError(
                f"data.dir={source}: {name} holds label {label}; expected 0 to 9: damaged, or not CIFAR-10"
            )
    splits = {
        split: np.concatenate([records[name] for name in names]) for split, names in FILES.items()
    }
    return {
        split: (rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0])
        for split, rows in splits.items()
    }


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each of the six files that a folder or an archive holds; nothing is unpacked to disk."""
    if source.is_dir():
        for path in (source / name for name in ALL_FILES):
            _check_size(source, path.name, path.stat().st_size)
            yield path.name, path.read_bytes()
        return
    try:
        with gzip.open(source) as stream:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    name = PurePosixPath(member.name).name
                    if member.isfile() and name in ALL_FILES:
                        _check_size(source, name, member.size)
                        yield name, tar.extractfile(member).read()
            while stream.read(1 << 20):  # to the very end, where gzip's own checksum stands
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"data.dir={source}: damaged or truncated ({error}): {source.stat().st_size:,} bytes; expected "
            f"a tar.gz such as the official {ARCHIVE} of {ARCHIVE_BYTES:,} bytes"
        ) from error


def _check_size(source: Path, name: str, size: int) -> None:
    expected = IMAGES_PER_FILE * RECORD_BYTES
    if size != expected:
        raise UserError(
            f"data.dir={source}: {name} has {size:,} bytes, not {expected:,}: truncated, or not CIFAR-10"
        )
