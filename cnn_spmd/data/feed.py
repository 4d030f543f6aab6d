"""Bring images to the devices: all at once, or those of each chunk.

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

    resident: every device holds the whole split, and a program takes the indices of its examples.
    Otherwise a program takes the examples themselves, and no indices. The results are the same.
    """

    place: Placement
    images: np.ndarray  # uint8 [N, H, W, C], in memory or mapped from disk
    labels: np.ndarray  # int32 [N]
    resident: bool

    # The split on every device, where it is resident; `load` puts it there.
    resident_data: DeviceData | None = None

    def load(self) -> None:
        """Put a resident split on the devices; do nothing for a streamed one."""
        if self.resident:
            everywhere = self.place.replicated
            self.resident_data = DeviceData(
                put(self.images, everywhere), put(self.labels, everywhere)
            )

    def shapes(self, *shape: int) -> tuple[DeviceData, jax.ShapeDtypeStruct | None]:
        """Return shapes, dtypes and shardings of what `calls` yields.

        shape: of the indices that one call of a program takes, [B] or [S, B].
        """
        if self.resident:
            everywhere = self.place.replicated
            data = DeviceData(
                jax.ShapeDtypeStruct(self.images.shape, self.images.dtype, sharding=everywhere),
                jax.ShapeDtypeStruct(self.labels.shape, self.labels.dtype, sharding=everywhere),
            )
            indices = jax.ShapeDtypeStruct(
                shape, jnp.int32, sharding=self._sharding("conv_batch", shape)
            )
            return data, indices
        data = [
            jax.ShapeDtypeStruct(
                (*shape, *array.shape[1:]),
                array.dtype,
                sharding=self._sharding(axis, shape, array.shape[1:]),
            )
            for axis, array in self._streamed()
        ]
        return DeviceData(*data), None

    def calls(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[DeviceData, jax.Array | None]]:
        """Yield the data and indices that a program takes, for each call of it.

        indices: the examples that each call sees; int32 [B] or [S, B]. A thread prepares the next
        call while the devices run this one.
        """
        return one_ahead(self._call, indices)

    def _call(self, indices: np.ndarray) -> tuple[DeviceData, jax.Array | None]:
        if self.resident:
            sharding = self._sharding("conv_batch", indices.shape)
            return self.resident_data, put(indices, sharding)
        data = [
            gather(array, indices, self._sharding(axis, indices.shape, array.shape[1:]))
            for axis, array in self._streamed()
        ]
        return DeviceData(*data), None

    def _streamed(self) -> tuple[tuple[str, np.ndarray], ...]:
        """Return each array with the logical axis of its batch."""
        return ("conv_batch", self.images), ("output_batch", self.labels)

    def _sharding(
        self, axis: str, shape: tuple[int, ...], inner: tuple[int, ...] = ()
    ) -> jax.sharding.NamedSharding:
        """Return the sharding of [*shape, *inner]: only the batch, shape[-1], is split."""
        axes = (None,) * (len(shape) - 1) + (axis,) + (None,) * len(inner)
        return self.place.sharding(axes, (*shape, *inner))


def one_ahead(make: Callable, inputs: Iterable) -> Iterator:
    """Yield make(each) for each input; a thread makes the next result meanwhile."""
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


def read_examples(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return array[indices], copied by all cores; an index names a row of axis 0.

    NumPy releases Python's lock while it copies. Where the array is mapped from a file, several
    reads at once also keep the disk busy.
    """
    flat = indices.ravel()
    found = np.empty((indices.size, *array.shape[1:]), array.dtype)
    rows = max(EXAMPLES_PER_READER, -(-indices.size // os.cpu_count()))

    def copy(start: int) -> None:
        own = slice(start, start + rows)
        array.take(flat[own], axis=0, out=found[own], mode="clip")

    for _ in READERS.map(copy, range(0, len(flat), rows)):
        pass  # the result raises what went wrong in a thread
    return found.reshape(*indices.shape, *array.shape[1:])
