"""Decode a data set once, and map it from disk ever after (np.memmap).

It may be larger than memory. Each data set has a folder of its own, which appears when it is
complete. Shapes: N images, H = W = size rows and columns, C = 3 channels (red, green, blue).
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from cnn_spmd.data import digest
from cnn_spmd.data.dataset import blank_arrays
from cnn_spmd.data.decoding import Workspace
from cnn_spmd.data.progress import print_note
from cnn_spmd.data.source import Source, without
from cnn_spmd.errors import UserError, one_line

# Up to this size, the pixels are read at each start and compared with their digest. It takes about
# a second per GB.
CHECKED_BYTES = 2 * 10**9
SHOWN = 20  # unreadable images that are named on the terminal
INFO = "info.json"  # in a prepared folder: the fields of Prepared, except the arrays


class Prepared(NamedTuple):
    """A data set whose images are decoded."""

    # {train,test}_images uint8 [N, H, W, C], on disk; {train,test}_labels int32 [N].
    arrays: dict[str, np.ndarray]
    digest: str  # of the arrays
    skipped: Sequence[str] = ()  # names of images that are left out, and why they cannot be read


def with_digest(arrays: dict[str, np.ndarray]) -> Prepared:
    """Return arrays with their digest."""
    return Prepared(arrays, digest.of_arrays(arrays))


def preview(source: Source, size: int) -> Prepared:
    """Return zeros in the shapes of what a source will be; they take no memory."""
    examples = {name: split.examples for name, split in source.splits.items()}
    return Prepared(blank_arrays(examples, size), digest="")


def find(source: Source, size: int, root: Path, skip_bad: int) -> Prepared | None:
    """Return the decoded squares of a source, or None where there are none yet.

    Warns of a damaged folder. Raises UserError where more than skip_bad images are left out.
    """
    folder = folder_of(source, size, root)
    found = read_folder(folder, warn=True)
    return None if found is None else accept(found, source, folder, skip_bad)


def prepare(source: Source, size: int, root: Path, skip_bad: int) -> Prepared:
    """Decode the images of a source, and return them as squares of `size` pixels.

    While one process prepares them, others that want the same wait. Raises UserError naming the
    images where more than skip_bad cannot be decoded, and where `root` cannot hold the result.
    """
    folder = folder_of(source, size, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with exclusive(workspace_of(source, size, root), source.name) as part:
            found = read_folder(folder)
            if found is None:
                decode_into(part, source, size, skip_bad)
                publish(part, folder)
                found = read_folder(folder)
    except OSError as error:
        raise UserError(
            f"TFDS_DATA_DIR={root.parent}: cannot keep the prepared images there "
            f"({one_line(error)}); choose a directory that can be written and has room"
        ) from error
    return accept(found, source, folder, skip_bad)


def keep(folder: Path, make: Callable[[], dict[str, np.ndarray]], name: str) -> Prepared:
    """Return the arrays that are kept in `folder`; make and keep them where there are none.

    make: returns the arrays that Prepared has; name: of what they are made from, for messages.
    Where they cannot be kept, a warning is logged.
    """
    found = read_folder(folder, warn=True)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder, name) as part:
            found = read_folder(folder)  # another process may have been first
            if found is None:
                print_note(f"preparing {name} in {folder}, once")
                found = with_digest(make())
                write_folder(part, found)
                publish(part, folder)
    except OSError as error:
        logging.warning(
            "TFDS_DATA_DIR=%s: cannot keep the arrays of %s there (%s): the next run prepares "
            "them again.",
            folder.parent.parent,
            name,
            one_line(error),
        )
    return found or with_digest(make())


def write_folder(folder: Path, prepared: Prepared) -> None:
    """Write arrays that `read_folder` can read. Raises OSError, and then leaves nothing behind."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        folder.mkdir()
        for name, array in prepared.arrays.items():
            np.save(folder / f"{name}.npy", array)
        write_info(folder, prepared.digest, prepared.skipped)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def folder_of(source: Source, size: int, root: Path) -> Path:
    """Return the folder of a source's decoded images; a changed file makes another."""
    return root / f"{source.fingerprint}-{size}"


def workspace_of(source: Source, size: int, root: Path) -> Path:
    """Return where a source is being decoded, without a suffix.

    The place does not depend on the files, so that decoding continues after some were mended.
    """
    name = hashlib.sha256(os.fsencode(os.path.realpath(source.name))).hexdigest()[:16]
    return root / f"{name}-{size}"


@contextlib.contextmanager
def exclusive(path: Path, name: str) -> Iterator[Path]:
    """Keep others from preparing the same data set; yield the folder to work in.

    path: where its files lie, without a suffix; name: of what is prepared, for messages.

    Where the file system has no locks, the folder is this process's own and is removed at the end.
    Then two processes at once do the work twice, without harm.
    """
    with path.with_suffix(".lock").open("a") as lock:
        if acquire(lock, f"waiting for another run, which prepares {name} in {path.parent}"):
            yield path.with_suffix(".part")
            return
        part = path.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def acquire(lock: io.TextIOBase, waiting: str) -> bool:
    """Lock an open file; return whether that worked. Prints `waiting` if it waits."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_note(waiting)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        logging.warning(
            "%s cannot be locked (%s): another run may prepare the same images at the same time.",
            lock.name,
            error.strerror,
        )
        return False
    return True


def decode_into(part: Path, source: Source, size: int, skip_bad: int) -> None:
    """Decode all images of a source in the folder `part`, and complete it.

    Raises UserError, as `prepare` does, and OSError.
    """
    workspace = Workspace(part, size)
    listing = part.with_suffix(".unreadable.txt")
    skipped: list[str] = []
    readable = source
    workspace.reserve(source)
    while unreadable := workspace.decode(readable):
        skipped += [image.text for image in unreadable]
        refuse_unreadable(source, skipped, skip_bad, listing)
        # In the next round, the images that can be read move up to close the gaps.
        readable = without(readable, unreadable)
    listing.unlink(missing_ok=True)
    if skipped:
        refuse_lost_class(source, workspace.states(readable), skip_bad)
    write_info(part, workspace.finish(readable), skipped)
    workspace.clean(readable)


def publish(part: Path, folder: Path) -> None:
    """Rename a finished folder, in place of a damaged one if there is one."""
    try:
        os.replace(part, folder)
    except OSError:
        if read_folder(folder) is None:  # otherwise another process published its own
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)


def accept(found: Prepared, source: Source, folder: Path, skip_bad: int) -> Prepared:
    """Return `found`, with a warning where images are left out.

    Raises UserError where these are more than skip_bad.
    """
    if found.skipped:
        refuse_unreadable(source, found.skipped, skip_bad, folder / INFO)
        print_note(
            f"warning: {source.name}: {len(found.skipped)} of {source.total:,} images cannot be "
            f"read and are left out, as data.skip_bad={skip_bad} allows; {folder / INFO} names them"
        )
    return found


def refuse_unreadable(source: Source, bad: Sequence[str], skip_bad: int, listing: Path) -> None:
    """Raise UserError where more than skip_bad images cannot be read.

    Several of them are printed. Where they are many, the file `listing` names all.
    """
    if len(bad) <= skip_bad:
        return
    lines = [text.replace("\n", r"\n") for text in bad]
    which = bad[0]
    if len(bad) > 1:
        for line in lines[:SHOWN]:
            print_note(f"cannot read {line}")
        which += f" and {len(bad) - 1:,} more of {source.total:,} images"
    if len(bad) > SHOWN:
        which += f", all of them listed in {listing}"
        if listing.name != INFO:
            listing.write_text("\n".join([*lines, ""]), "utf-8", "backslashreplace")
    raise UserError(
        f"{source.name}: cannot read {which}: mend or remove them, or go on without "
        f"them by --config.data.skip_bad={len(bad)}"
    )


def refuse_lost_class(source: Source, states: dict[str, np.ndarray], skip_bad: int) -> None:
    """Raise UserError where all images of a class cannot be read."""
    for split, state in states.items():
        lost = np.setdiff1d(np.arange(len(source.class_names)), state["label"])
        if lost.size:
            raise UserError(
                f"data.skip_bad={skip_bad}: leaves no image of class "
                f"{source.class_names[lost[0]]!r} in {split}, expected at least one: "
                "mend the images that cannot be read"
            )


def read_folder(folder: Path, warn: bool = False) -> Prepared | None:
    """Return what is prepared in `folder`, or None where that is nothing.

    A damaged folder counts as nothing. warn: log what is damaged.
    """
    if not folder.is_dir():
        return None
    try:
        arrays = read_arrays(folder)
        found = Prepared(arrays, **json.loads((folder / INFO).read_text()))
        is_small = sum(array.nbytes for array in arrays.values()) <= CHECKED_BYTES
        if is_small and found.digest != digest.of_arrays(arrays):
            raise ValueError("its pixels or labels are not those that were prepared")
        return found
    except (OSError, ValueError, TypeError, EOFError) as error:
        if warn:
            text = one_line(error)
            logging.warning("%s is damaged (%s): preparing the images again.", folder, text)
        return None


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Map the images and read the labels. Raises NumPy's errors and ValueError."""
    arrays = {}
    for split in ("train", "test"):
        images = arrays[f"{split}_images"] = np.load(folder / f"{split}_images.npy", mmap_mode="r")
        labels = arrays[f"{split}_labels"] = np.load(folder / f"{split}_labels.npy")
        if len(images) != len(labels):
            raise ValueError(f"{split} images and labels differ in number")
    return arrays


def write_info(folder: Path, arrays_digest: str, skipped: Sequence[str]) -> None:
    """Write INFO of a folder that is not published yet."""
    (folder / INFO).write_text(json.dumps(dict(digest=arrays_digest, skipped=skipped)))
