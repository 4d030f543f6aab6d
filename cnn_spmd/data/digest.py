"""Digests of data sets: two are equal where all pixels and labels are, in the same order."""

import hashlib
from collections.abc import Iterable

import numpy as np


def of_image(image_HWC: np.ndarray) -> int:
    """The digest of one image's pixels, 64 bits."""
    return int.from_bytes(hashlib.blake2b(image_HWC, digest_size=8).digest(), "little")


def of_splits(splits: Iterable[tuple[np.ndarray, np.ndarray]]) -> str:
    """The digest of a data set, from its images' digests uint64 [N] and labels int32 [N], a pair each for train and test."""
    whole = hashlib.blake2b(digest_size=8)
    for digests_N, labels_N in splits:
        whole.update(np.array([len(labels_N)], "<u8"))
        whole.update(np.asarray(digests_N, "<u8"))
        whole.update(np.asarray(labels_N, "<i4"))
    return whole.hexdigest()


def of_arrays(arrays: dict[str, np.ndarray]) -> str:
    """The digest of {train,test}_images and {train,test}_labels; about 1 GB a second."""
    return of_splits((np.array([of_image(image) for image in arrays[f"{split}_images"]], np.uint64), arrays[f"{split}_labels"])
                     for split in ("train", "test"))


def of_text(text: str) -> str:
    """The digest of data that are a function of this text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
