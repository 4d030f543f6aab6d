"""Bring images to the devices, as the compiled programs take them.

Resident data are on the devices before training begins. Streamed data come chunk by chunk
(streaming.py).

Shapes: N examples of a split, S steps of a chunk, B global batch, H height, W width, C channels.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnn_spmd.sharding.placement import Placement

READERS = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
# A thread copies at least this many examples: for fewer, starting it takes longer.
EXAMPLES_PER_READER = 16


class DeviceData(NamedTuple):
    """Examples on the devices.

    Resident data are a whole split, on every device. Streamed data are the examples of one chunk,
    and each device holds its shard of each batch. Sharded data: sharded.py.
    """

    images: jax.Array  # uint8 [N, H, W, C], or streamed [S, B, H, W, C]
    labels: jax.Array  # int32 [N], or streamed [S, B]


def labels_of(data: DeviceData, indices_B: jax.Array | None) -> jax.Array:
    """Return the labels of the examples `indices_B`; None: of all in `data`."""
    return data.labels if indices_B is None else data.labels[indices_B]


@dataclasses.dataclass
class Feed:
    """A split of the data set, as the compiled programs take it.

    The kinds of feed differ in where the images live. The results are the same to the last bit.
    """

    place: Placement
    images: np.ndarray  # uint8 [N, H, W, C], in memory or mapped from disk
    labels: np.ndarray  # int32 [N]

    # Whether what is streamed to GPUs comes from page-locked memory; None: nothing is.
    page_locked: bool | None = dataclasses.field(default=None, init=False)

    def load(self) -> None:
        """Put on the devices what stays there during the run."""

    def shapes(self, *shape: int) -> tuple[DeviceData, jax.ShapeDtypeStruct | None]:
        """Return shapes, dtypes and shardings of what `calls` yields.

        shape: of the indices that one call of a program takes, [B] or [S, B].
        """
        raise NotImplementedError

    def calls(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[DeviceData, jax.Array | None]]:
        """Yield the data and indices that a program takes, for each call of it.

        indices: the examples that each call sees; int32 [B] or [S, B]. A thread prepares the next
        call while the devices run this one.
        """
        return one_ahead(self.call, indices)

    def call(self, indices: np.ndarray) -> tuple[DeviceData, jax.Array | None]:
        """Return the data and indices that a program takes, for one call of it."""
        raise NotImplementedError

    def sharding(
        self, axis: str, shape: tuple[int, ...], inner: tuple[int, ...] = ()
    ) -> jax.sharding.NamedSharding:
        """Return the sharding of [*shape, *inner]: only the batch, shape[-1], is split."""
        axes = (None,) * (len(shape) - 1) + (axis,) + (None,) * len(inner)
        return self.place.sharding(axes, (*shape, *inner))


@dataclasses.dataclass
class Resident(Feed):
    """A split that every device holds whole; a program takes the indices of its examples."""

    # On the devices; `load` puts it there.
    data: DeviceData | None = dataclasses.field(default=None, init=False)

    def load(self) -> None:
        """Put the split on every device."""
        everywhere = self.place.replicated
        self.data = DeviceData(put(self.images, everywhere), put(self.labels, everywhere))

    def shapes(self, *shape: int) -> tuple[DeviceData, jax.ShapeDtypeStruct]:
        """Return shapes, dtypes and shardings of the split and of the indices."""
        everywhere = self.place.replicated
        data = [
            jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere)
            for array in (self.images, self.labels)
        ]
        sharding = self.sharding("conv_batch", shape)
        return DeviceData(*data), jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    def call(self, indices: np.ndarray) -> tuple[DeviceData, jax.Array]:
        """Return the split, and the indices of a call."""
        return self.data, put(indices, self.sharding("conv_batch", indices.shape))


def one_ahead(make: Callable, inputs: Iterable) -> Iterator:
    """Yield make(each) for each input; a thread makes the next result meanwhile.

    An error in the thread is raised here, in its turn.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        ahead = None
        for each in inputs:
            ahead, ready = thread.submit(make, each), ahead
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return the host's array on the devices; every process gives the same array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather(array: np.ndarray, indices: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return array[indices] on the devices, for indices of [B] or [S, B].

    A process reads only what its own devices hold, and reads it once.
    """
    batch_axis = indices.ndim - 1
    read = functools.cache(lambda start, stop: read_examples(array, indices[..., start:stop]))

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return read(index[batch_axis].start, index[batch_axis].stop)

    return jax.make_array_from_callback((*indices.shape, *array.shape[1:]), sharding, shard)


def read_examples(
    array: np.ndarray, indices: np.ndarray, found: np.ndarray | None = None
) -> np.ndarray:
    """Return array[indices], copied by all cores; an index names a row of axis 0.

    found: an array to read into, instead of a new one. NumPy releases Python's lock while it
    copies. Where the array is mapped from a file, several reads at once also keep the disk busy.
    """
    if found is None:
        found = np.empty((*indices.shape, *array.shape[1:]), array.dtype)
    flat, examples = indices.ravel(), found.reshape(indices.size, *array.shape[1:])
    rows = max(EXAMPLES_PER_READER, -(-indices.size // os.cpu_count()))

    def copy(start: int) -> None:
        own = slice(start, start + rows)
        array.take(flat[own], axis=0, out=examples[own], mode="clip")

    for _ in READERS.map(copy, range(0, len(flat), rows)):
        pass  # the result raises what went wrong in a thread
    return found
