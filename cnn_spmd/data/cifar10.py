"""Load CIFAR-10 as a TFDS data set, which is prepared and decoded once.

The source is a download or local files. It needs no TensorFlow. Shapes: N images, H = W = 32 rows
and columns, C = 3 channels (RGB). Source: Krizhevsky 2009, "Learning Multiple Layers of Features
from Tiny Images"; https://www.cs.toronto.edu/~kriz/cifar.html
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

from cnn_spmd.data import cifar10_archive
from cnn_spmd.errors import UserError, one_line

# An unreachable host is noticed within this time. TFDS alone retries for minutes.
PROBE_SECONDS = 10.0


class Unreachable(UserError):
    """Raised where CIFAR-10 is not on disk and cannot be downloaded."""


def load(data_dir: str) -> dict[str, np.ndarray]:
    """Return CIFAR-10's arrays, in the archive's order.

    These are {train,test}_images, uint8 [N, H, W, C], and {train,test}_labels, int32 [N].

    data_dir: the archive, the folder cifar-10-batches-bin, or a folder that holds one of them;
    "": the official archive, which is downloaded where it was not prepared before.

    The first call prepares a TFDS data set in TFDS's data directory ($TFDS_DATA_DIR or
    ~/tensorflow_datasets), and stores the decoded arrays beside it. Both have a name made from the
    source's content, so that another archive never gets these arrays.

    Raises UserError for a missing, damaged or wrong source, and Unreachable where none can be had.
    """
    source = cifar10_archive.find(data_dir) if data_dir else None
    config = tfds.core.BuilderConfig(
        name=cifar10_archive.fingerprint(source) if source else "official"
    )
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
    """The TFDS data set: PNG images and labels in array_record files.

    source: the archive, or the folder it unpacks to; None: the download.
    """

    name = "cnn_spmd_cifar10"  # TFDS's own cifar10 may lie in the same data directory
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: Path | None = None, **kwargs):
        self.source = source
        super().__init__(file_format="array_record", **kwargs)

    @property
    def url_infos(self) -> dict[str, tfds.download.checksums.UrlInfo]:
        """Return the size and checksum that TFDS expects of the download."""
        return {
            cifar10_archive.URL: tfds.download.checksums.UrlInfo(
                size=cifar10_archive.ARCHIVE_BYTES,
                checksum=cifar10_archive.ARCHIVE_SHA256,
                filename=cifar10_archive.ARCHIVE,
            )
        }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR-10: 60,000 colour images of 32x32 pixels in 10 classes.",
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=cifar10_archive.SHAPE_HWC, encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(names=cifar10_archive.CLASS_NAMES),
                }
            ),
            supervised_keys=("image", "label"),
            # The archive's order, which is the same on every machine.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        splits = cifar10_archive.read(self.source or Path(dl_manager.download(cifar10_archive.URL)))
        return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

    def _generate_examples(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for index, (image_HWC, label) in enumerate(zip(images_NHWC, labels_N, strict=True)):
            # TFDS accepts the array too, but would encode it with TensorFlow.
            png = io.BytesIO()
            Image.fromarray(image_HWC).save(png, "png")
            yield index, {"image": png.getvalue(), "label": int(label)}


def prepare(source: Path | None, root: Path, config: tfds.core.BuilderConfig, folder: Path) -> None:
    """Build the TFDS data set in `folder`.

    TFDS writes elsewhere and renames at the end, so that `folder` is complete or missing.

    Raises Unreachable where the download fails, and UserError where the source is damaged or the
    data directory cannot be written. Then it leaves nothing behind.
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
        raise Unreachable(
            f"the download of {cifar10_archive.URL} failed ({one_line(error)})"
        ) from error
    except OSError as error:
        # Where the folder is there, another process was first to rename, with the same result.
        if not folder.is_dir():
            raise UserError(
                f"TFDS_DATA_DIR={root}: cannot prepare CIFAR-10 there ({one_line(error)}); choose "
                "a directory that can be written and has 600 MB of room"
            ) from error
    finally:
        remove_empty(folder.parent, folder.parent.parent)


def remove_empty(*folders: Path) -> None:
    """Remove those of the folders that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def probe() -> None:
    """Raise Unreachable unless the archive's host answers within PROBE_SECONDS.

    It asks through a proxy where the environment names one.
    """
    answer: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            with requests.get(cifar10_archive.URL, stream=True, timeout=PROBE_SECONDS) as response:
                answer.put("" if response.ok else f"HTTP status {response.status_code}")
        except Exception as error:  # whatever it is, the answer is no
            # The first cause says most: requests and urllib3 wrap it several times.
            while error.__context__ is not None:
                error = error.__context__
            answer.put(one_line(error))

    # The timeout of requests covers neither a stalled name server nor retries. So we ask in a
    # thread, and do not wait for it longer than that.
    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answer.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        problem = f"no answer in {PROBE_SECONDS:g} s"
    if problem:
        raise Unreachable(f"cannot reach {cifar10_archive.URL} ({problem})")


def decode(folder: Path) -> dict[str, np.ndarray]:
    """Read the prepared data set; return the arrays as `load` does.

    Raises UserError where it is damaged.
    """
    print(f"decoding CIFAR-10 from {folder}, once (less than a minute)", file=sys.stderr)
    arrays = {}
    try:
        builder = tfds.builder_from_directory(folder)
        for split in cifar10_archive.FILES:
            examples = builder.as_data_source(split)
            images = arrays[f"{split}_images"] = np.empty(
                (len(examples), *cifar10_archive.SHAPE_HWC), np.uint8
            )
            labels = arrays[f"{split}_labels"] = np.empty(len(examples), np.int32)
            for index, example in enumerate(examples):
                images[index], labels[index] = example["image"], example["label"]
        check_form(arrays)
    except Exception as error:  # array_record, protobuf, Pillow and TFDS each raise their own
        raise UserError(
            f"{folder}: the prepared data is damaged ({one_line(error)}); delete this folder, and "
            "it is prepared again"
        ) from error
    return arrays


def read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """Return the decoded arrays, or None where there are none.

    The .npz file has checksums. Where they show damage, a warning is logged.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as cache:
            arrays = dict(cache)
        check_form(arrays)
        return arrays
    except Exception as error:  # whatever is wrong with the file, it can be made again
        logging.warning("%s is damaged (%s): decoding CIFAR-10 again.", path, one_line(error))
        return None


def write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Store the decoded arrays, all or nothing.

    Where the folder cannot be written, a warning is logged.
    """
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


def check_form(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError unless the arrays have the shapes and dtypes of CIFAR-10."""
    for split, names in cifar10_archive.FILES.items():
        n = len(names) * cifar10_archive.IMAGES_PER_FILE
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        found = (images.shape, images.dtype, labels.shape, labels.dtype)
        if found != ((n, *cifar10_archive.SHAPE_HWC), np.uint8, (n,), np.int32):
            raise ValueError(f"{split} images and labels are {found}, expected {n:,} images")
