"""Decode many photographs into files on disk, by all cores.

A killed process loses nothing: the next one continues where it stopped.

Shapes: N photographs of a split; M images that a file has room for, the largest N of all attempts.
H = W = size rows and columns, C = 3 channels (red, green, blue).
"""

import concurrent.futures
import functools
import itertools
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnn_spmd.data import digest, progress, square
from cnn_spmd.data.progress import Progress, print_note
from cnn_spmd.data.source import Source, Split, Unreadable
from cnn_spmd.errors import UserError, one_line

IMAGES_PER_TASK = 64  # a thread decodes these before it takes the next task
HEADER_BYTES = 128  # of a .npy file, before its values: NumPy's header for uint8 [N, H, W, C]

# What is stored of each decoded image until all are decoded. A key of 0 means: not decoded.
STATE = np.dtype([("key", np.uint64), ("digest", np.uint64), ("label", np.int32)])


class Rows(NamedTuple):
    """The decoded images of a split, mapped from disk."""

    images: np.ndarray  # uint8 [M, H, W, C]
    state: np.ndarray  # STATE [M]


class Workspace:
    """A folder in which photographs are decoded.

    The steps are `reserve`, `decode`, `finish` and `clean`. A killed process leaves the folder
    behind, and the next one continues there.
    """

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        self.size = size
        self.image_bytes = size * size * 3

    def reserve(self, source: Source) -> None:
        """Create the files, with room for all images.

        Raises UserError or OSError where the disk has less, and leaves nothing new behind.
        """
        is_new = not self.folder.exists()
        self._refuse_small_disk(source.total, is_new)
        megabytes = source.total * self.image_bytes / 1e6
        print_note(
            f"preparing {source.total:,} images of {source.name}, once "
            f"({megabytes:,.1f} MB in {self.folder.parent})"
        )
        self.folder.mkdir(exist_ok=True)
        try:
            for name, split in source.splits.items():
                allocate(self._images_file(name), HEADER_BYTES + split.examples * self.image_bytes)
                allocate(self._state_file(name), split.examples * STATE.itemsize)
        except OSError:
            if is_new:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def decode(self, source: Source) -> list[Unreadable]:
        """Decode what is not decoded yet; return the photographs that cannot be read."""
        rows = {name: self._open(name, split) for name, split in source.splits.items()}
        kept = sum(np.count_nonzero(each.state["key"]) for each in rows.values())
        if 0 < kept < source.total:
            print_note(f"{kept:,} of these images are decoded already")
        bad = []
        shown = Progress(source.total, kept)
        # Pillow decodes and rescales without Python's lock, so threads are enough.
        pool = concurrent.futures.ThreadPoolExecutor(progress.cores())
        try:
            for name, split in source.splits.items():
                task = functools.partial(decode_some, split, rows[name])
                for new, unreadable in pool.map(task, range(0, split.examples, IMAGES_PER_TASK)):
                    bad += [Unreadable(name, index, text) for index, text in unreadable]
                    shown.update(new)
                rows[name].images.flush()
        finally:
            pool.shutdown(cancel_futures=True)
            shown.close()
        return bad

    def finish(self, source: Source) -> str:
        """Turn the files into {train,test}_{images,labels}.npy; return the arrays' digest."""
        states = self.states(source)
        for name, state in states.items():
            with self._images_file(name).open("r+b") as file:
                file.truncate(HEADER_BYTES + len(state) * self.image_bytes)
                shape = (len(state), self.size, self.size, 3)
                header = dict(descr="|u1", fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(file, header)
            np.save(self.folder / f"{name}_labels.npy", state["label"])
        return digest.of_splits((state["digest"], state["label"]) for state in states.values())

    def states(self, source: Source) -> dict[str, np.ndarray]:
        """Return each split's state, STATE [N], from disk."""
        return {
            name: np.fromfile(self._state_file(name), STATE)[: split.examples]
            for name, split in source.splits.items()
        }

    def clean(self, source: Source) -> None:
        """Remove what only decoding needs."""
        for name in source.splits:
            self._state_file(name).unlink()

    def _images_file(self, split: str) -> Path:
        return self.folder / f"{split}_images.npy"

    def _state_file(self, split: str) -> Path:
        return self.folder / f"{split}_state"

    def _refuse_small_disk(self, images: int, is_new: bool) -> None:
        needed = images * self.image_bytes
        free = shutil.disk_usage(self.folder.parent).free
        if not is_new:
            free += sum(path.stat().st_size for path in self.folder.iterdir())
        if needed > free:
            raise UserError(
                f"TFDS_DATA_DIR={self.folder.parent.parent}: has {free:,} bytes free, but "
                f"{images:,} images of {self.size}x{self.size} need {needed:,} bytes: choose a "
                "directory with room, or a smaller data.image_size"
            )

    def _open(self, name: str, split: Split) -> Rows:
        """Map the files of a split, with its images moved to their rows."""
        count = self._state_file(name).stat().st_size // STATE.itemsize
        shape = (count, self.size, self.size, 3)
        images = np.memmap(self._images_file(name), np.uint8, "r+", HEADER_BYTES, shape)
        state = np.memmap(self._state_file(name), STATE, "r+", 0, (count,))
        rows = Rows(images, state)
        rearrange(rows, split.keys)
        return rows


def allocate(path: Path, size: int) -> None:
    """Extend a file to at least `size` bytes that the disk really has.

    Its content stays, and zeros follow. Without the room, a write through a memory map would end
    the process with a bus error.
    """
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif file.tell() < size:  # macOS
            file.truncate(size)


def rearrange(rows: Rows, keys: np.ndarray) -> None:
    """Move the images of an earlier attempt to their rows in `keys`, uint64 [N].

    Files may have been added or removed since. Both lists are sorted by name. So moves to the
    front, first row first, and then moves to the back, last row first, never overwrite an image
    that is still needed. Where the order has changed, all images are decoded again.
    """
    images, state = rows
    old_row = {key: row for row, key in enumerate(state["key"].tolist()) if key}
    old_row_N = np.array([old_row.get(key, -1) for key in keys.tolist()], int)
    (kept,) = np.nonzero(old_row_N >= 0)
    if (np.diff(old_row_N[kept]) <= 0).any():
        kept = kept[:0]
    to_the_front = kept[old_row_N[kept] > kept]
    to_the_back = kept[old_row_N[kept] < kept][::-1]
    for row in itertools.chain(to_the_front, to_the_back):
        images[row] = images[old_row_N[row]]
        state[row] = state[old_row_N[row]]
    state["key"][np.setdiff1d(np.arange(len(state)), kept)] = 0


def decode_some(split: Split, rows: Rows, start: int) -> tuple[int, list[tuple[int, str]]]:
    """Decode the IMAGES_PER_TASK photographs from `start` on, where still needed.

    Returns how many it has tried, and index and text of each that cannot be read.
    """
    images, state = rows
    new, bad = 0, []
    for i in range(start, min(start + IMAGES_PER_TASK, split.examples)):
        # After a power cut, the pixels may differ from what the state says.
        if state["key"][i] and state["digest"][i] == digest.of_image(images[i]):
            continue
        new += 1
        name = f"image {i}"
        try:
            name, file, label = split.read(i)
            pixels = square.decode(file, images.shape[1])
        except Exception as error:  # Pillow and TFDS raise many types for damaged files
            bad.append((i, f"{name} ({one_line(error)})"))
            continue
        images[i] = pixels
        # The state is written last, so that a kill leaves no state without pixels.
        state[i] = split.keys[i], digest.of_image(pixels), label
    return new, bad
