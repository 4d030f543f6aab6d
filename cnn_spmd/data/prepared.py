"""Images of any size, decoded once by all cores into .npy files of one size that are read back as np.memmap.

A data set may be larger than memory. Krizhevsky et al. 2012, section 2: the shorter side is rescaled to `size` pixels, and the
central size x size are kept. Legend: N images, H = W = size rows and columns, C = 3 channels (red, green, blue).
"""

import concurrent.futures
import contextlib
import fcntl
import io
import itertools
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageOps, UnidentifiedImageError

from cnn_spmd.data import digest
from cnn_spmd.errors import UserError

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # without a name; an image twice as large is refused by name
FORMATS = ("JPEG", "PNG", "WEBP")  # pillow knows many more: EPS is a program, a TIFF may hold numbers that are no pixels
CHUNK = 64  # images that a thread decodes at a time
PROGRESS_SECONDS = 10.0
INFO = "info.json"  # of a prepared folder: what Prepared has besides the arrays


class Split(NamedTuple):
    """Where the images of a split come from."""

    examples: int
    read: Callable[[int], tuple[str, Path | io.BytesIO, int]]  # image i: a name for people, its file, its label


class Prepared(NamedTuple):
    """A data set whose images are decoded."""

    arrays: dict[str, np.ndarray]  # {train,test}_images, uint8 [N, H, W, C] on disk; {train,test}_labels, int32 [N]
    digest: str  # of the arrays; "" of zeros that stand in for them


class Source(NamedTuple):
    """A data set as it is found, before anything is decoded."""

    name: str
    splits: dict[str, Split]  # train and test
    class_names: tuple[str, ...]
    content: str  # a digest of names and sizes: a copy's is the same
    fingerprint: str  # another one wherever a file has changed


def arrays_of(source: Source, size: int, root: Path, check: Callable[[Prepared], object]) -> Prepared:
    """The images and labels of a source, in its order, images as squares of `size` pixels.

    They are kept in a folder of their own in `root`, all or nothing; while one process prepares them, others that want the
    same wait. check: sees arrays of these shapes, all zeros, before anything is decoded. Raises UserError naming the images
    that cannot be decoded, and where `root` cannot hold them.
    """
    folder = root / f"{source.fingerprint}-{size}"
    if (found := read(folder)) is not None:
        return found
    check(Prepared({f"{split}_{what}": np.broadcast_to(zero, (examples, *sides))  # which take no memory
           for split, (examples, _) in source.splits.items()
           for what, zero, sides in (("images", np.uint8(0), (size, size, 3)), ("labels", np.int32(0), ()))}, ""))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run, which prepares {source.name} in {folder}", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := read(folder)) is None:
                prepare(source, folder, size)
                found = read(folder)
    except OSError as error:
        raise UserError(f"TFDS_DATA_DIR={root.parent}: cannot keep the prepared images there ({one_line(error)}); choose a "
                        "directory that can be written") from error
    return found


def prepare(source: Source, folder: Path, size: int) -> None:
    """Decodes all images into `folder`, which is not there until all of it is. Raises UserError as above; OSError."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed: whoever lives holds the lock
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    total, done, bad = sum(split.examples for split in source.splits.values()), 0, []
    needed, free = total * size * size * 3, shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(f"TFDS_DATA_DIR={folder.parent.parent}: has {free / 1e9:.1f} GB free, but {total:,} images of "
                        f"{size}x{size} need {needed / 1e9:.1f} GB: choose a directory with room, or a smaller data.image_size")
    print(f"preparing {total:,} images of {source.name}, once ({needed / 1e9:.2g} GB in {folder})", file=sys.stderr, flush=True)
    part.mkdir()
    since = said = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())  # pillow decodes and resizes without Python's lock
    try:
        for split, (examples, read_one) in source.splits.items():
            images = np.lib.format.open_memmap(part / f"{split}_images.npy", "w+", np.uint8, (examples, size, size, 3))
            labels = np.empty(examples, np.int32)

            def decode(start, images=images, labels=labels, read_one=read_one):
                errors = []
                for i in range(start, min(start + CHUNK, len(labels))):
                    name = f"image {i}"
                    try:
                        name, file, labels[i] = read_one(i)
                        images[i] = decoded(file, size)
                    except Exception as error:  # pillow and TFDS raise many kinds for damaged files
                        errors.append(f"{name} ({one_line(error)})")
                return errors

            for errors in pool.map(decode, range(0, examples, CHUNK)):
                bad += errors
                done = min(done + CHUNK, total)
                if (now := time.monotonic()) - said > PROGRESS_SECONDS:
                    said = now
                    print(f"prepared {done:,} of {total:,} images, {done / (now - since):,.0f} a second", file=sys.stderr,
                          flush=True)
            images.flush()
            np.save(part / f"{split}_labels.npy", labels)
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise UserError(f"{source.name}: cannot read {', '.join(bad[:3])}{more}: mend these images or remove them")
        os.replace(part, folder)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(part, ignore_errors=True)


def decoded(file: Path | io.BytesIO, size: int) -> np.ndarray:
    """The central square of an image, rescaled (bilinear, with antialiasing) to uint8 [size, size, 3].

    Grey, palette, CMYK and 16-bit images become RGB; transparency is dropped, and so is a camera's orientation (EXIF), as
    TFDS's and torchvision's readers do. The content decides what a file is, not its name. Raises ValueError for another
    format, and what pillow does for a damaged file.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("is no JPEG, PNG or WebP image") from None
    with image:
        if image.mode.startswith("I"):  # 16-bit grey; 16-bit colour, pillow reads as 8 bits by itself
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "P":
            image = image.convert("RGBA")  # a palette may hold transparency
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR))


def read(folder: Path) -> Prepared | None:
    """What `prepare` has left in `folder`; None where there is nothing, or it is damaged, which is said.

    A folder without a digest gets one.
    """
    if not folder.is_dir():
        return None
    try:
        arrays = {f"{split}_{what}": np.load(folder / f"{split}_{what}.npy", mmap_mode="r" if what == "images" else None)
                  for split, what in itertools.product(("train", "test"), ("images", "labels"))}
        for split in ("train", "test"):
            if len(arrays[f"{split}_images"]) != len(arrays[f"{split}_labels"]):
                raise ValueError(f"{split} images and labels differ in number")
        with contextlib.suppress(FileNotFoundError):
            return Prepared(arrays, **json.loads((folder / INFO).read_text()))
        found = Prepared(arrays, digest.of_arrays(arrays))
        with contextlib.suppress(OSError):
            write_info(folder, found)
        return found
    except (OSError, ValueError, EOFError) as error:
        logging.warning("%s is damaged (%s): preparing the images again.", folder, one_line(error))
        return None


def write_info(folder: Path, found: Prepared) -> None:
    """Keeps what is known of prepared images beside them, all or nothing."""
    part = folder / f"{INFO}.{os.getpid()}.part"
    part.write_text(json.dumps({field: value for field, value in found._asdict().items() if field != "arrays"}))
    os.replace(part, folder / INFO)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
