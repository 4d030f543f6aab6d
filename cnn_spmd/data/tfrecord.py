"""Read TFRecord files, which are TFDS's default format, without TensorFlow.

A file is a chain of records. Each is its length (uint64), a checksum of the length (4 bytes), the
content, and a checksum of the content (4 bytes). The checksums are not compared: they are CRC-32C,
which Python's standard library does not have. Format:
https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import functools
import mmap
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Examples(Sequence):
    """The examples of a split, in TFRecord files that are mapped into memory.

    paths: the files; counts: the number of records in each; parse: turns a record into an example.
    A file is searched for its records when the first of them is read.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], parse: Callable[[bytes], Any]):
        self._paths = paths
        self._ends = np.cumsum(counts)
        self._parse = parse
        self._find = functools.cache(find_records)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        file = int(np.searchsorted(self._ends, i, side="right"))
        first = int(self._ends[file - 1]) if file else 0
        content, records = self._find(self._paths[file], int(self._ends[file]) - first)
        start, stop = records[i - first].tolist()
        return self._parse(content[start:stop])


def find_records(path: Path, count: int) -> tuple[mmap.mmap, np.ndarray]:
    """Return a file's content, and where each record starts and stops in it, int64 [N, 2].

    Raises ValueError where it is cut off or does not hold `count` records.
    """
    with open(path, "rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    records, at = [], 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        records.append((at + 12, at + 12 + length))
        at += length + 16
    if at != len(content) or len(records) != count:
        raise ValueError(f"{path.name}: damaged: holds {len(records):,} records, not {count:,}")
    return content, np.array(records, np.int64)
