"""Compute digests of data sets.

Two are equal when all pixels and labels are equal, in the same order.
"""

import hashlib
from collections.abc import Iterable

import numpy as np


def of_image(image_HWC: np.ndarray) -> int:
    """Return the digest of one image's pixels; 64 bits."""
    pixels = np.ascontiguousarray(image_HWC)
    return int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "little")


def of_splits(splits: Iterable[tuple[np.ndarray, np.ndarray]]) -> str:
    """Return a data set's digest; 16 hexadecimal digits.

    splits: for each, the digests of its images, uint64 [N], and its labels, int32 [N].
    """
    total = hashlib.blake2b(digest_size=8)
    for digests_N, labels_N in splits:
        total.update(np.array([len(labels_N)], "<u8"))
        total.update(np.ascontiguousarray(digests_N, "<u8"))
        total.update(np.ascontiguousarray(labels_N, "<i4"))
    return total.hexdigest()


def of_arrays(arrays: dict[str, np.ndarray]) -> str:
    """Return the digest of {train,test}_images and {train,test}_labels.

    It takes about a second per GB.
    """
    splits = []
    for split in ("train", "test"):
        digests_N = np.array([of_image(image) for image in arrays[f"{split}_images"]], np.uint64)
        splits.append((digests_N, arrays[f"{split}_labels"]))
    return of_splits(splits)


def of_text(text: str) -> str:
    """Return the digest of data that are a function of this text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
