"""Read CIFAR-10's binary archive, or the folder it unpacks to.

No pickle is loaded. Shapes: N images, H = W = 32 rows and columns, C = 3 channels (RGB).
Format: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
"""

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from cnn_spmd.data import digest
from cnn_spmd.errors import UserError

# The official archive, with checksum and size from TFDS (its url_checksums/cifar10.txt).
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_BYTES = 170_052_171
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

# It holds records of one label byte, and then 32x32 bytes each of red, green and blue.
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
DIGEST = digest.CIFAR10  # of all its pixels and labels, by data/digest.py
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CLASS_NAMES = tuple(CLASSES.split())


def find(data_dir: str) -> Path:
    """Return the archive, or the folder of batches, that `data_dir` is or holds.

    Raises UserError where it is neither.
    """
    path = Path(data_dir).expanduser()
    of_other_versions = sum(OTHER_VERSIONS.values(), ())
    for file in (path, path / ARCHIVE):
        if file.is_file() and file.name not in of_other_versions:
            return file
    for folder in (path, path / FOLDER):
        if folder.is_dir() and (folder.name == FOLDER or holds_any(folder, ALL_FILES)):
            return folder
    problem, advice = "does not exist", ""
    if path.exists():
        problem = "holds no CIFAR-10 in its binary version"
        if (path / "train").is_dir():
            advice = "; for photographs in class folders, set --config.data.name=folder"
        for version, names in OTHER_VERSIONS.items():
            if path.name in names or holds_any(path, names):
                problem = f"is CIFAR-10 in its {version} version, expected the binary version"
    raise UserError(
        f"data.dir={data_dir}: {problem}; give {ARCHIVE}, the folder {FOLDER}, or a folder "
        f"that holds either or TFDS's cifar10{advice}"
    )


def holds_any(folder: Path, names: Sequence[str]) -> bool:
    """Return whether one of the names exists in a folder."""
    return any((folder / name).exists() for name in names)


def examples() -> dict[str, int]:
    """Return the number of images in each split."""
    return {split: len(names) * IMAGES_PER_FILE for split, names in FILES.items()}


def fingerprint(archive: Path) -> str:
    """Return a name for an archive's content.

    It is "official", or "local-" and 12 hexadecimal digits of the SHA-256. Raises UserError where
    it cannot be read.
    """
    with open_file(archive, archive) as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return "official" if sha256 == ARCHIVE_SHA256 else f"local-{sha256[:12]}"


def read(source: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an archive or a folder, in the files' order.

    These are {train,test}_images, uint8 [N, H, W, C], and {train,test}_labels, int32 [N].
    Raises UserError naming the file that is missing, damaged, of the wrong size, or wrong.
    """
    records = {
        name: np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
        for name, content in read_files(source)
    }
    for name in ALL_FILES:
        if name not in records:
            raise UserError(f"data.dir={source}: lacks {name}; expected {', '.join(ALL_FILES)}")
        label = records[name][:, 0].max()
        if label >= len(CLASS_NAMES):
            raise UserError(
                f"data.dir={source}: {name} holds label {label}; expected 0 to 9: damaged, or not "
                "CIFAR-10"
            )
    arrays = {}
    for split, names in FILES.items():
        rows = np.concatenate([records[name] for name in names])
        images_NCHW = rows[:, 1:].reshape(-1, 3, 32, 32)
        arrays[f"{split}_images"] = np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1))
        arrays[f"{split}_labels"] = rows[:, 0].astype(np.int32)
    return arrays


def read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each of the six files of a folder or archive.

    Nothing is unpacked to disk. Raises UserError for a damaged archive and a file of another size.
    """
    if source.is_dir():
        for name in ALL_FILES:
            with open_file(source, source / name) as stream:
                content = stream.read()
            check_size(source, name, len(content))
            yield name, content
        return
    try:
        with gzip.open(source) as stream:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    name = PurePosixPath(member.name).name
                    if member.isfile() and name in ALL_FILES:
                        check_size(source, name, member.size)
                        yield name, tar.extractfile(member).read()
            # Read to the very end, where gzip compares its checksum.
            while stream.read(1 << 20):
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"data.dir={source}: damaged or truncated ({error}): {source.stat().st_size:,} bytes; "
            f"expected a tar.gz such as the official {ARCHIVE} of {ARCHIVE_BYTES:,} bytes"
        ) from error


def open_file(source: Path, path: Path) -> io.BufferedReader:
    """Open the archive, or a file of the folder `source`. Raises UserError where it cannot."""
    if path.is_fifo():  # opening it would wait for its writer
        raise UserError(f"data.dir={source}: {path.name}: is a pipe; expected a readable file")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"data.dir={source}: {path.name}: {error.strerror}; expected a readable file"
        ) from error


def check_size(source: Path, name: str, size: int) -> None:
    """Raise UserError unless a file has the size of IMAGES_PER_FILE records."""
    expected = IMAGES_PER_FILE * RECORD_BYTES
    if size != expected:
        raise UserError(
            f"data.dir={source}: {name} has {size:,} bytes, not {expected:,}: truncated, or not "
            "CIFAR-10"
        )
