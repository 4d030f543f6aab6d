"""How the devices get their images: the whole data set lies on each of them, or a call's images are streamed from the host.

Shapes: N examples of a split, S steps a call, B global batch, H height, W width, C channels.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnn_spmd.sharding.placement import Placement

READERS, MIN_PART = (
    concurrent.futures.ThreadPoolExecutor(os.cpu_count()),
    16,
)  # examples that are worth a thread


class DeviceData(NamedTuple):
    """A split of the data set, whole on every device; or, streamed, the examples of a call, split along their batch."""

    images: jax.Array  # uint8 [N, H, W, 3] or [S, B, H, W, 3]
    labels: jax.Array  # int32 [N] or [S, B]


def labels_of(data: DeviceData, indices_B: jax.Array | None) -> jax.Array:
    """The labels of the examples `indices_B`; None: `data` are these examples."""
    return data.labels if indices_B is None else data.labels[indices_B]


@dataclasses.dataclass
class Feed:
    """A split of the data set, as the programs of Steps take it.

    resident: all of it is put on every device once, and a call is given the indices of its examples; else a call is given
    the examples themselves, each device its own, and no indices. The numbers are the same.
    """

    place: Placement
    images: np.ndarray  # uint8 [N, H, W, C], in memory or mapped from disk
    labels: np.ndarray  # int32 [N]
    resident: bool

    whole: DeviceData | None = None  # the split on every device, once `load` has put it there

    def load(self) -> None:
        """Puts a resident split on the devices."""
        if self.resident:
            self.whole = DeviceData(
                put(self.images, self.place.replicated), put(self.labels, self.place.replicated)
            )

    def shapes(self, *shape: int) -> tuple[DeviceData, jax.ShapeDtypeStruct | None]:
        """What a call takes for indices of this shape, [B] or [S, B]: shapes, dtypes and shardings alone."""
        if self.resident:
            data = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.place.replicated)
                for x in (self.images, self.labels)
            ]
            return DeviceData(*data), jax.ShapeDtypeStruct(
                shape, jnp.int32, sharding=self._sharding("conv_batch", shape)
            )
        return DeviceData(
            *(
                jax.ShapeDtypeStruct(
                    (*shape, *x.shape[1:]), x.dtype, sharding=self._sharding(axis, shape, x)
                )
                for axis, x in (("conv_batch", self.images), ("output_batch", self.labels))
            )
        ), None

    def calls(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[DeviceData, jax.Array | None]]:
        """What each call takes, for int32 [B] or [S, B] which examples it sees; made one call ahead, in a thread."""
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            ahead = None
            for each in indices:
                ahead, ready = thread.submit(self._call, each), ahead
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def _call(self, indices: np.ndarray) -> tuple[DeviceData, jax.Array | None]:
        if self.resident:
            return self.whole, put(indices, self._sharding("conv_batch", indices.shape))
        return DeviceData(
            *(
                gather(x, indices, self._sharding(axis, indices.shape, x))
                for axis, x in (("conv_batch", self.images), ("output_batch", self.labels))
            )
        ), None

    def _sharding(
        self, axis: str, shape: tuple[int, ...], examples: Any = None
    ) -> jax.sharding.NamedSharding:
        """Of indices [..., B], or of the `examples` that they name: all split along their batch."""
        inner = () if examples is None else examples.shape[1:]
        return self.place.sharding(
            (None,) * (len(shape) - 1) + (axis,) + (None,) * len(inner), (*shape, *inner)
        )


def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """The host's array on the devices of any process; every process gives the same array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather(array: np.ndarray, indices: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """array[indices] on the devices; a process reads what its own devices hold, once."""
    batch = indices.ndim - 1
    read = functools.cache(lambda start, stop: taken(array, indices[..., start:stop]))
    return jax.make_array_from_callback(
        (*indices.shape, *array.shape[1:]),
        sharding,
        lambda index: read(index[batch].start, index[batch].stop),
    )


def taken(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """array[indices] for the first axis, by many threads: NumPy copies without Python's lock, and a disk likes company."""
    flat, found = indices.ravel(), np.empty((indices.size, *array.shape[1:]), array.dtype)
    part = max(MIN_PART, -(-indices.size // os.cpu_count()))
    list(
        READERS.map(
            lambda at: array.take(flat[at : at + part], 0, found[at : at + part], "clip"),
            range(0, len(flat), part),
        )
    )
    return found.reshape(*indices.shape, *array.shape[1:])
