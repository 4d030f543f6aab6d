"""Describe photographs as they are found: in files, of any size, not decoded."""

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Photograph(NamedTuple):
    """An image in its file."""

    name: str  # for messages
    file: str | io.BytesIO  # a path, or the content
    label: int


class Split(NamedTuple):
    """The photographs of one split."""

    examples: int
    read: Callable[[int], Photograph]  # photograph i, for i below `examples`
    keys: np.ndarray  # uint64 [N], of key_of; equal keys mean equal pixels and labels


class Source(NamedTuple):
    """A data set of photographs."""

    name: str  # the folder it was found in
    splits: dict[str, Split]  # "train" and "test"
    class_names: tuple[str, ...]
    content: str  # a digest of names and sizes: a copy of the files has the same
    fingerprint: str  # a digest that changes whenever a file changes, and differs for a copy
    is_held_out: bool = False  # whether "test" is a part of what there is to train on
    side: int = 0  # of each image, in pixels, where all are squares of one size; otherwise 0

    @property
    def total(self) -> int:
        """Return the number of photographs in both splits."""
        return sum(split.examples for split in self.splits.values())


class Unreadable(NamedTuple):
    """A photograph that cannot be decoded."""

    split: str
    index: int
    text: str  # its name, and why it cannot be decoded


def key_of(identity: bytes) -> int:
    """Return 64 bits that stand for what an image is decoded from; never 0."""
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little") | 1


def without(source: Source, bad: Sequence[Unreadable]) -> Source:
    """Return the source less some photographs; the others move up."""
    splits = {}
    for name, split in source.splits.items():
        dropped = [image.index for image in bad if image.split == name]
        kept = np.setdiff1d(np.arange(split.examples), dropped)
        splits[name] = select(split, kept)
    return source._replace(splits=splits)


def select(split: Split, indices: np.ndarray) -> Split:
    """Return the photographs of a split that `indices`, int [N], name."""
    return Split(len(indices), lambda i: split.read(int(indices[i])), split.keys[indices])
