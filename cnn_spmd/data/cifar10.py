"""CIFAR-10 as a TFDS data set that needs no TensorFlow: downloaded or local, prepared once, decoded once.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; https://www.cs.toronto.edu/~kriz/cifar.html
Legend: N images, H = W = 32 rows and columns, C = 3 channels (red, green, blue).
"""

import contextlib
import io
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import requests
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from cnn_spmd.data import cifar10_archive as archive
from cnn_spmd.errors import UserError

PROBE_SECONDS = 10.0  # an unreachable host is noticed within this; TFDS alone retries for minutes


class Unreachable(UserError):
    """CIFAR-10 is neither on disk nor downloadable."""


def load(data_dir: str) -> dict[str, np.ndarray]:
    """CIFAR-10 in the archive's order: {train,test}_images uint8 [N, H, W, C], {train,test}_labels int32 [N].

    data_dir: the archive, the folder cifar-10-batches-bin, or a folder that holds one of them; "" is the official
    archive, as prepared before or else downloaded. The first call prepares a TFDS data set in TFDS's data directory
    ($TFDS_DATA_DIR or ~/tensorflow_datasets) and keeps the decoded arrays beside it, both under a name made from the
    source's content, so that one archive is never served from another one's cache.

    Raises UserError for a missing, damaged or wrong source, Unreachable where there is none to be had.
    """
    source = archive.find(data_dir) if data_dir else None
    config = tfds.core.BuilderConfig(name=archive.fingerprint(source) if source else "official")
    root = Path(tfds.core.constants.get_default_data_dir()).expanduser()
    folder = root / Cifar10.name / config.name / str(Cifar10.VERSION)
    arrays = read_cache(folder / "decoded.npz")
    if arrays is None:
        if not folder.is_dir():
            prepare(source, root, config, folder)
        arrays = decode(folder)
        write_cache(folder / "decoded.npz", arrays)
    return arrays


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The TFDS data set: PNG images and labels in array_record files, from `source` (None: the download)."""

    name = "cnn_spmd_cifar10"  # TFDS's own cifar10 may lie in the same data directory
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: Path | None = None, **kwargs):
        self.source = source
        super().__init__(file_format="array_record", **kwargs)

    @property
    def url_infos(self) -> dict[str, tfds.download.checksums.UrlInfo]:
        """What TFDS's download manager holds the download against."""
        return {
            archive.URL: tfds.download.checksums.UrlInfo(
                size=archive.ARCHIVE_BYTES,
                checksum=archive.ARCHIVE_SHA256,
                filename=archive.ARCHIVE,
            )
        }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR-10: 60,000 colour images of 32x32 pixels in 10 classes.",
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=archive.SHAPE_HWC, encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=archive.CLASS_NAMES),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keep the archive's order, the same on every machine
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        splits = archive.read(self.source or Path(dl_manager.download(archive.URL)))
        return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

    def _generate_examples(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for index, (image_HWC, label) in enumerate(zip(images_NHWC, labels_N, strict=True)):
            png = io.BytesIO()  # TFDS would take the array, but encode it with TensorFlow
            Image.fromarray(image_HWC).save(png, "png")
            yield index, {"image": png.getvalue(), "label": int(label)}


def prepare(source: Path | None, root: Path, config: tfds.core.BuilderConfig, folder: Path) -> None:
    """Builds the TFDS data set in `folder`, all or nothing: TFDS writes elsewhere and renames at the end.

    Raises Unreachable where the download fails, UserError where the source or the data directory is not right.
    """
    if source is None:
        probe()
    print(f"preparing CIFAR-10 in {folder}, once (less than a minute)", file=sys.stderr)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder = Cifar10(source, data_dir=root, config=config)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints two banners
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    except (
        requests.RequestException,
        tfds.download.DownloadError,
        tfds.download.download_manager.NonMatchingChecksumError,
    ) as error:
        raise Unreachable(f"the download of {archive.URL} failed ({_one_line(error)})") from error
    except OSError as error:
        if (
            not folder.is_dir()
        ):  # else another process was first to rename, and what we want is there
            raise UserError(
                f"TFDS_DATA_DIR={root}: cannot prepare CIFAR-10 there ({_one_line(error)}); choose a "
                "directory that can be written and has 600 MB of room"
            ) from error


def probe() -> None:
    """Raises Unreachable unless the archive's host answers within PROBE_SECONDS; proxies are respected."""
    answer: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            with requests.get(archive.URL, stream=True, timeout=PROBE_SECONDS) as response:
                answer.put("" if response.ok else f"HTTP status {response.status_code}")
        except Exception as error:  # whatever it is, the answer is no
            while (
                error.__context__ is not None
            ):  # the cause, without requests' and urllib3's wrappings
                error = error.__context__
            answer.put(_one_line(error))

    # In a thread that can be left behind: requests' own timeout covers neither a stalled name server nor retries.
    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answer.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        problem = f"no answer in {PROBE_SECONDS:g} s"
    if problem:
        raise Unreachable(f"cannot reach {archive.URL} ({problem})")


def decode(folder: Path) -> dict[str, np.ndarray]:
    """Reads the prepared data set; returns what `load` does. Raises UserError where it is damaged."""
    print(f"decoding CIFAR-10 from {folder}, once (less than a minute)", file=sys.stderr)
    arrays = {}
    try:
        builder = tfds.builder_from_directory(folder)
        for split in archive.FILES:
            examples = builder.as_data_source(split)
            images = arrays[f"{split}_images"] = np.empty(
                (len(examples), *archive.SHAPE_HWC), np.uint8
            )
            labels = arrays[f"{split}_labels"] = np.empty(len(examples), np.int32)
            for index, example in enumerate(examples):
                images[index], labels[index] = example["image"], example["label"]
        _check(arrays)
    except Exception as error:  # array_record, protobuf, PIL and TFDS each raise their own
        raise UserError(
            f"{folder}: the prepared data is damaged ({_one_line(error)}); delete this folder, and it is "
            "prepared again"
        ) from error
    return arrays


def read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """The decoded arrays, or None where they are to be decoded (again). The npz's checksums tell a damaged file."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as cache:
            arrays = dict(cache)
        _check(arrays)
        return arrays
    except Exception as error:  # whatever is wrong with it, it can be made again
        logging.warning("%s is damaged (%s): decoding CIFAR-10 again.", path, _one_line(error))
        return None


def write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keeps the decoded arrays, all or nothing; where the folder cannot be written, says so and goes on."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(part, path)
    except OSError as error:
        logging.warning(
            "%s: cannot keep the decoded images (%s): the next run decodes them again.", path, error
        )
    finally:
        part.unlink(missing_ok=True)


def _check(arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless `arrays` are what `load` returns."""
    for split, names in archive.FILES.items():
        n = len(names) * archive.IMAGES_PER_FILE
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        found = (images.shape, images.dtype, labels.shape, labels.dtype)
        if found != ((n, *archive.SHAPE_HWC), np.uint8, (n,), np.int32):
            raise ValueError(f"{split} images and labels are {found}, expected {n:,} images")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
