"""A data set as arrays on the host."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str  # what it really is: "digits" even where cifar10 was asked for
    train_images: np.ndarray  # uint8 [N, H, W, C]; in memory, or photographs as np.memmap
    train_labels: np.ndarray  # int32 [N]
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    mirror: bool  # a mirrored image keeps its label (digits: no)
    fallback: str | None = None  # the data set that was asked for, where this one stands in for it
    files: str = ""  # a digest of its files' names and sizes, where the name does not have one
    digest: str = ""  # of all pixels and labels; "": they are still to be decoded
    skipped: int = 0  # photographs that cannot be read and are left out
