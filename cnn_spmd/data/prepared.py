"""Images of any size, decoded once by all cores into .npy files of one size that are read back as np.memmap.

A data set may be larger than memory. Krizhevsky et al. 2012, section 2: the shorter side is rescaled to `size` pixels, and the
central size x size are kept. Legend: N images, H = W = size rows and columns, C = 3 channels (red, green, blue).
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageOps, UnidentifiedImageError

from cnn_spmd.data import digest
from cnn_spmd.errors import UserError

warnings.simplefilter(
    "ignore", Image.DecompressionBombWarning
)  # without a name; an image twice as large is refused by name
# pillow knows many more: an EPS file is a program, a TIFF file may hold numbers that are no pixels.
FORMATS = ("JPEG", "PNG", "WEBP")
CHUNK = 64  # images that a thread decodes at a time
CHECKED_BYTES = 2 * 10**9  # images are read again at each start, a second per GB, up to this size
PROGRESS_SECONDS = 10.0
SHOWN = 20  # images that cannot be read and are named on the terminal
INFO = "info.json"  # of a prepared folder: what Prepared has besides the arrays
HEADER = 128  # bytes of a .npy file before its values: what numpy writes for uint8 [N, H, W, C]
# What is kept of an image that is decoded, until all are; zeros where it is not.
STATE = np.dtype([("key", np.uint64), ("digest", np.uint64), ("label", np.int32)])


class Split(NamedTuple):
    """Where the images of a split come from."""

    examples: int
    read: Callable[
        [int], tuple[str, Path | io.BytesIO, int]
    ]  # image i: a name for people, its file, its label
    keys: np.ndarray  # uint64 [N]: equal ones mean equal pixels and labels (key_of)


class Prepared(NamedTuple):
    """A data set whose images are decoded."""

    # {train,test}_images, uint8 [N, H, W, C] on disk; {train,test}_labels, int32 [N].
    arrays: dict[str, np.ndarray]
    digest: str  # of the arrays; "" of zeros that stand in for them
    skipped: Sequence[str] = ()  # images that cannot be read and are not in the arrays, and why


class Source(NamedTuple):
    """A data set as it is found, before anything is decoded."""

    name: str
    splits: dict[str, Split]  # train and test
    class_names: tuple[str, ...]
    content: str  # a digest of names and sizes: a copy's is the same
    fingerprint: str  # another one wherever a file has changed


class Unreadable(NamedTuple):
    """An image that cannot be read."""

    split: str
    index: int
    text: str  # its name, and why


def key_of(identity: bytes) -> int:
    """Gives 64 bits that stand for what an image is decoded from; never 0."""
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little") | 1


def arrays_of(
    source: Source, size: int, root: Path, check: Callable[[Prepared], object], skip_bad: int = 0
) -> Prepared:
    """Gives the images of a source as squares of `size` pixels, and their labels.

    They are kept in a folder of their own in `root`, all or nothing. While one process prepares
    them, others that want the same wait. check: called with zeros of these shapes before anything
    is decoded. Raises UserError where more than skip_bad images cannot be decoded, naming them, and
    where `root` cannot hold them.
    """
    folder = root / f"{source.fingerprint}-{size}"
    if (found := read(folder)) is None:
        check(stand_in(source, size))
        try:
            root.mkdir(parents=True, exist_ok=True)
            with alone(source, size, root) as part:
                if (found := read(folder)) is None:
                    prepare(source, folder, part, size, skip_bad)
                    found = read(folder)
        except OSError as error:
            raise UserError(
                f"TFDS_DATA_DIR={root.parent}: cannot keep the prepared images there "
                f"({one_line(error)}); choose a directory that can be written and has "
                "room"
            ) from error
    if found.skipped:
        refuse(source, found.skipped, skip_bad, folder / INFO)
        say(
            f"WARNING: {source.name}: {len(found.skipped)} of {total_of(source):,} images cannot "
            f"be read and are left out, as data.skip_bad={skip_bad} allows; {folder / INFO} names "
            "them"
        )
    return found


def stand_in(source: Source, size: int) -> Prepared:
    """Gives zeros in the shapes of what a source will be; they take no memory."""
    arrays = {}
    for split, (examples, *_) in source.splits.items():
        arrays[f"{split}_images"] = np.broadcast_to(np.uint8(0), (examples, size, size, 3))
        arrays[f"{split}_labels"] = np.broadcast_to(np.int32(0), (examples,))
    return Prepared(arrays, "")


def total_of(source: Source) -> int:
    """Counts the images of both splits."""
    return sum(split.examples for split in source.splits.values())


def say(text: str) -> None:
    """Prints a line on the standard error stream."""
    print(text, file=sys.stderr, flush=True)


def place_of(source: Source, size: int, root: Path) -> Path:
    """Names where a source is prepared, without a suffix.

    It is the same place after some of the files have been mended.
    """
    name = hashlib.sha256(os.fsencode(os.path.realpath(source.name))).hexdigest()[:16]
    return root / f"{name}-{size}"


@contextlib.contextmanager
def alone(source: Source, size: int, root: Path) -> Iterator[Path]:
    """Keeps others from preparing the same images; yields the folder to do so in.

    The next process continues with what is left in that folder. Where the file system has no locks,
    the folder is this process's own and is removed at the end. Then two processes that prepare the
    same images at once do the work twice, without harm.
    """
    place = place_of(source, size, root)
    with place.with_suffix(".lock").open("a") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another run, which prepares {source.name} in {root}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logging.warning(
                "%s cannot be locked (%s): another run may prepare the same images at "
                "the same time.",
                lock.name,
                error.strerror,
            )
            part = place.with_suffix(f".{uuid.uuid4().hex}.part")
            try:
                yield part
            finally:
                shutil.rmtree(part, ignore_errors=True)
            return
        yield place.with_suffix(".part")


def prepare(source: Source, folder: Path, part: Path, size: int, skip_bad: int) -> None:
    """Decodes all images in `part`, which then becomes `folder`.

    Raises UserError, as arrays_of does, and OSError.
    """
    listing, bad, left = part.with_suffix(".unreadable.txt"), [], source
    reserve_all(source, part, size)
    while unreadable := decode_all(left, part, size):  # the next time, the others close the gaps
        bad += [image.text for image in unreadable]
        refuse(source, bad, skip_bad, listing)
        left = without(left, unreadable)
    listing.unlink(missing_ok=True)
    finish(left, part, size, bad, skip_bad)
    try:
        os.replace(part, folder)
    except OSError:
        if not folder.is_dir():
            raise
        if read(folder) is None:  # it is damaged
            shutil.rmtree(folder)
            os.replace(part, folder)
        else:  # another process was first
            shutil.rmtree(part)


def reserve_all(source: Source, part: Path, size: int) -> None:
    """Makes `part` with room for all images.

    Where there is not enough, it raises UserError or OSError and leaves nothing new.
    """
    total, is_new = total_of(source), not part.exists()
    needed = total * size * size * 3
    there = 0 if is_new else sum(path.stat().st_size for path in part.iterdir())
    free = shutil.disk_usage(part.parent).free + there
    if needed > free:
        free_text, needed_text = amounts(free, needed)
        raise UserError(
            f"TFDS_DATA_DIR={part.parent.parent}: has {free_text} free, but {total:,} "
            f"images of {size}x{size} need {needed_text}: choose a directory with "
            "room, or a smaller data.image_size"
        )
    (room,) = amounts(needed)
    say(f"preparing {total:,} images of {source.name}, once ({room} in {part.parent})")
    part.mkdir(exist_ok=True)
    try:
        for split, (examples, *_) in source.splits.items():
            reserve(part / f"{split}_images.npy", HEADER + examples * size * size * 3)
            reserve(part / f"{split}_state", examples * STATE.itemsize)
    except OSError:
        if is_new:
            shutil.rmtree(part, ignore_errors=True)
        raise


def reserve(path: Path, size: int) -> None:
    """Makes a file of at least `size` bytes, for which the disk has room.

    What is in it stays, the rest is zeros. Without the room, a write through a memory map would end
    the process with a bus error.
    """
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif file.tell() < size:  # macOS
            file.truncate(size)


def amounts(*sizes: int) -> list[str]:
    """Writes numbers of bytes in the largest unit that shows how they differ."""
    for unit, of_unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        texts = [f"{size / of_unit:,.1f} {unit}" for size in sizes]
        if max(sizes) >= of_unit and len({*texts}) == len({*sizes}):
            return texts
    return [f"{size:,} bytes" for size in sizes]


def decode_all(source: Source, part: Path, size: int) -> list[Unreadable]:
    """Decodes what is not yet decoded in `part`; returns what cannot be read."""
    total, done, bad = total_of(source), 0, []
    parts = {name: opened(part, name, split.keys, size) for name, split in source.splits.items()}
    kept = sum(np.count_nonzero(state["key"]) for _, state in parts.values())
    if 0 < kept < total:
        say(f"{kept:,} of these images are decoded already")
    since = said = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(
        os.cpu_count()
    )  # pillow decodes and resizes without Python's lock
    try:
        for name, split in source.splits.items():
            images, state = parts[name]
            decode = functools.partial(decode_chunk, split, images, state)
            for found in pool.map(decode, range(0, split.examples, CHUNK)):
                bad += [Unreadable(name, *image) for image in found]
                done = min(done + CHUNK, total)
                if (now := time.monotonic()) - said > PROGRESS_SECONDS:
                    said = now
                    speed = done / (now - since)
                    say(f"prepared {done:,} of {total:,} images, {speed:,.0f} a second")
            images.flush()
    finally:
        pool.shutdown(cancel_futures=True)
    return bad


def opened(part: Path, split: str, keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Opens the images of a split, uint8 [M, H, W, C], and their state, STATE [M].

    M is the largest N of all attempts.
    """
    rows = (part / f"{split}_state").stat().st_size // STATE.itemsize
    images = np.memmap(part / f"{split}_images.npy", np.uint8, "r+", HEADER, (rows, size, size, 3))
    state = np.memmap(part / f"{split}_state", STATE, "r+", 0, (rows,))
    rearrange(images, state, keys)
    return images, state


def rearrange(images: np.ndarray, state: np.ndarray, keys: np.ndarray) -> None:
    """Moves what an earlier attempt has decoded to where it belongs now.

    Files may have gone or come since. Both lists are in the order of names: moves to the front from
    first to last, and then moves to the back from last to first, overwrite nothing that is wanted.
    Where the order is another one, nothing is kept.
    """
    row_of = {key: row for row, key in enumerate(state["key"].tolist()) if key}
    row_N = np.array([row_of.get(key, -1) for key in keys.tolist()], int)
    (kept,) = np.nonzero(row_N >= 0)
    if (np.diff(row_N[kept]) <= 0).any():
        kept = kept[:0]
    for i in itertools.chain(kept[row_N[kept] > kept], kept[row_N[kept] < kept][::-1]):
        images[i], state[i] = images[row_N[i]], state[row_N[i]]
    state["key"][np.setdiff1d(np.arange(len(state)), kept)] = 0


def decode_chunk(
    split: Split, images: np.ndarray, state: np.ndarray, start: int
) -> list[tuple[int, str]]:
    """Decodes images from `start` on that are not decoded yet.

    Returns which cannot be read: index, name and why.
    """
    bad = []
    for i in range(start, min(start + CHUNK, split.examples)):
        # After a power cut, the pixels may not be what the state says.
        if state["key"][i] and state["digest"][i] == digest.of_image(images[i]):
            continue
        name = f"image {i}"
        try:
            name, file, label = split.read(i)
            image = decoded(file, images.shape[1])
        except Exception as error:  # pillow and TFDS raise many kinds for damaged files
            bad.append((i, f"{name} ({one_line(error)})"))
            continue
        images[i] = image
        state[i] = split.keys[i], digest.of_image(image), label  # last, in case of a kill
    return bad


def refuse(source: Source, bad: Sequence[str], skip_bad: int, listing: Path) -> None:
    """Raises UserError where more than skip_bad images cannot be read.

    Several are printed, and where these are many, `listing` has all of them.
    """
    if len(bad) <= skip_bad:
        return
    lines, which = [text.replace("\n", r"\n") for text in bad], bad[0]
    if len(bad) > 1:
        for line in lines[:SHOWN]:
            say(f"cannot read {line}")
        which += f" and {len(bad) - 1:,} more of {total_of(source):,} images"
    if len(bad) > SHOWN:
        which += f", all of them listed in {listing}"
        if listing.name != INFO:
            listing.write_text("\n".join([*lines, ""]), "utf-8", "backslashreplace")
    raise UserError(
        f"{source.name}: cannot read {which}: mend or remove them, or go on without "
        f"them by --config.data.skip_bad={len(bad)}"
    )


def without(source: Source, bad: list[Unreadable]) -> Source:
    """Leaves some images out of a source."""
    splits = {}
    for name, split in source.splits.items():
        gone = [image.index for image in bad if image.split == name]
        kept = np.setdiff1d(np.arange(split.examples), gone)
        splits[name] = Split(
            len(kept), lambda i, kept=kept, read=split.read: read(int(kept[i])), split.keys[kept]
        )
    return source._replace(splits=splits)


def finish(source: Source, part: Path, size: int, skipped: list[str], skip_bad: int) -> None:
    """Turns what is decoded in `part` into what `read` reads."""
    states = {
        split: np.fromfile(part / f"{split}_state", STATE)[:examples]
        for split, (examples, *_) in source.splits.items()
    }
    for split, state in states.items():
        lost = np.setdiff1d(np.arange(len(source.class_names)), state["label"])
        if skipped and lost.size:
            raise UserError(
                f"data.skip_bad={skip_bad}: leaves no image of class "
                f"{source.class_names[lost[0]]!r} in {split}, expected at least one: "
                "mend the images that cannot be read"
            )
    for split, state in states.items():
        with (part / f"{split}_images.npy").open("r+b") as file:
            file.truncate(HEADER + len(state) * size * size * 3)
            header = dict(descr="|u1", fortran_order=False, shape=(len(state), size, size, 3))
            np.lib.format.write_array_header_1_0(file, header)
        np.save(part / f"{split}_labels.npy", state["label"])
    whole = digest.of_splits((state["digest"], state["label"]) for state in states.values())
    write_info(part, Prepared({}, whole, skipped))
    for split in states:
        (part / f"{split}_state").unlink()


def decoded(file: Path | io.BytesIO, size: int) -> np.ndarray:
    """The central square of an image, rescaled (bilinear, with antialiasing) to uint8 [size, size, 3].

    Grey, palette, CMYK and 16-bit images become RGB; transparency is dropped, and so is a camera's orientation (EXIF), as
    TFDS's and torchvision's readers do. The content decides what a file is, not its name. Raises
    ValueError for another format, and what pillow does for a damaged file.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("is no JPEG, PNG or WebP image") from None
    with image:
        if image.mode.startswith(
            "I"
        ):  # 16-bit grey; 16-bit colour, pillow reads as 8 bits by itself
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "P":
            image = image.convert("RGBA")  # a palette may hold transparency
        return np.asarray(
            ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        )


def read(folder: Path) -> Prepared | None:
    """Reads what `prepare` has left in `folder`.

    Returns None where there is nothing, or where it is damaged, which is said. A folder without a
    digest gets one.
    """
    if not folder.is_dir():
        return None
    try:
        arrays = {
            f"{split}_{what}": np.load(
                folder / f"{split}_{what}.npy", mmap_mode="r" if what == "images" else None
            )
            for split, what in itertools.product(("train", "test"), ("images", "labels"))
        }
        for split in ("train", "test"):
            if len(arrays[f"{split}_images"]) != len(arrays[f"{split}_labels"]):
                raise ValueError(f"{split} images and labels differ in number")
        with contextlib.suppress(FileNotFoundError):
            found = Prepared(arrays, **json.loads((folder / INFO).read_text()))
            small = sum(array.nbytes for array in arrays.values()) <= CHECKED_BYTES
            if small and found.digest != digest.of_arrays(arrays):
                raise ValueError("its pixels or labels are not those that were prepared")
            return found
        found = Prepared(arrays, digest.of_arrays(arrays))
        with contextlib.suppress(OSError):
            write_info(folder, found)
        return found
    except (OSError, ValueError, TypeError, EOFError) as error:
        logging.warning("%s is damaged (%s): preparing the images again.", folder, one_line(error))
        return None


def write_info(folder: Path, found: Prepared) -> None:
    """Writes what is known of prepared images beside them, all or nothing."""
    part = folder / f"{INFO}.{os.getpid()}.part"
    known = {field: value for field, value in found._asdict().items() if field != "arrays"}
    part.write_text(json.dumps(known))
    os.replace(part, folder / INFO)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
