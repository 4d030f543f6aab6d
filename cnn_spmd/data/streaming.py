"""Stream images from the host: gather those of each chunk, and copy them to the devices.

Three stages run at once. While the devices run a chunk, they receive the images of the next one,
and a thread gathers those of the chunk after that. Two buffers on the host take turns. On NVIDIA
GPUs they are page-locked: the GPU then reads them by itself, at the full rate of its link.

Images are not cropped before they are copied. Where a buffer is page-locked, the copy takes less
time than the steps of a chunk, and it is the step that draws the crops.

Shapes: S steps of a chunk, B global batch, H height, W width, C channels.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding

from cnn_spmd.data.feed import DeviceData, Feed, one_ahead, put, read_examples

BUFFERS = 2  # one is filled while the other is copied


@dataclasses.dataclass
class Streamed(Feed):
    """A split that stays on the host; a program takes the examples themselves, and no indices."""

    def shapes(self, *shape: int) -> tuple[DeviceData, None]:
        """Return shapes, dtypes and shardings of the examples of one call."""
        arrays = zip((self.images, self.labels), self._shardings(shape), strict=True)
        data = [
            jax.ShapeDtypeStruct((*shape, *array.shape[1:]), array.dtype, sharding=sharding)
            for array, sharding in arrays
        ]
        return DeviceData(*data), None

    def calls(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[DeviceData, None]]:
        """Yield the examples of each call; the next call's are copied and gathered meanwhile.

        A copy begins when the programs that were launched before it have ended, because XLA may
        give it memory that they still use. So a copy is begun one call early: before the caller
        launches the program that it shall run beside.
        """
        buffers = [Buffer() for _ in range(BUFFERS)]
        filled = one_ahead(self._fill, zip(itertools.cycle(buffers), indices))
        try:
            ready = None
            for buffer, each in filled:
                copying = self._copy(buffer, each)
                if ready is not None:
                    yield ready
                ready = copying
            if ready is not None:
                yield ready
        finally:
            filled.close()
            for buffer in buffers:
                buffer.release()

    def _fill(self, turn: tuple["Buffer", np.ndarray]) -> tuple["Buffer", np.ndarray]:
        """Read the images of a call into a buffer."""
        buffer, indices = turn
        of_images, _ = self._shardings(indices.shape)
        self.page_locked = buffer.fill(self.images, indices, of_images)
        return turn

    def _copy(self, buffer: "Buffer", indices: np.ndarray) -> tuple[DeviceData, None]:
        """Begin to copy a buffer's images and their labels to the devices."""
        of_images, of_labels = self._shardings(indices.shape)
        return DeviceData(buffer.put(of_images), put(self.labels[indices], of_labels)), None

    def _shardings(self, shape: tuple[int, ...]) -> tuple[NamedSharding, NamedSharding]:
        """Return the shardings of images and labels, for indices of this shape."""
        images = self.sharding("conv_batch", shape, self.images.shape[1:])
        return images, self.sharding("output_batch", shape)


class Buffer:
    """Memory of the host for the images of one chunk, used again for later chunks.

    It holds what the devices of this process take, each shard once. `release` ends its use.
    """

    def __init__(self):
        self._memory = np.empty(0, np.uint8)
        self._locked: bool | None = None  # None: not tried
        self._client: Any = None  # what locks the memory
        self._shape: tuple[int, ...] = ()  # of the images, [B, H, W, C] or [S, B, H, W, C]
        self._shards: dict[tuple, np.ndarray] = {}  # by their part of the batch
        self._copy: jax.Array | None = None  # the devices' array that is copied from here

    def fill(self, array: np.ndarray, indices: np.ndarray, sharding: NamedSharding) -> bool | None:
        """Read the shards of array[indices], for indices of [B] or [S, B].

        Return whether the memory is page-locked; None on a CPU.
        """
        self._wait()
        self._shape = (*indices.shape, *array.shape[1:])
        index_of = sharding.addressable_devices_indices_map(self._shape)
        parts = sorted({self._part(index) for index in index_of.values()})
        shape = len(parts), *sharding.shard_shape(self._shape)
        size = math.prod(shape)
        if len(self._memory) < size:
            self.release()
            self._memory = np.empty(size, np.uint8)
        shards = self._memory[:size].reshape(shape)
        # All at once: threads copy long runs of examples faster than short ones.
        read_examples(array, np.stack([indices[..., slice(*part)] for part in parts]), shards)
        self._shards = dict(zip(parts, shards, strict=True))
        if self._locked is None:  # now that it is filled: locking untouched pages takes far longer
            self._client = client_of(next(iter(index_of)))
            self._locked = lock_or_warn(self._memory, self._client)
        return self._locked

    def put(self, sharding: NamedSharding) -> jax.Array:
        """Begin to copy the images to the devices; return their array."""
        copied = aliases(sharding)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            found = self._shards[self._part(index)]
            return found.copy() if copied else found

        self._copy = jax.make_array_from_callback(self._shape, sharding, shard)
        return self._copy

    def release(self) -> None:
        """Give the memory back, once nothing is copied from it."""
        self._wait()
        if self._locked:
            self._client.dma_unmap(self._memory.ctypes.data)
        self._memory, self._locked, self._shards = np.empty(0, np.uint8), None, {}

    def _wait(self) -> None:
        """Wait until nothing is copied from this buffer."""
        jax.block_until_ready(self._copy)
        self._copy = None

    def _part(self, index: tuple[slice, ...]) -> tuple[int | None, int | None]:
        """Return which part of the batch a shard holds."""
        batch = index[len(self._shape) - 4]
        return batch.start, batch.stop


def aliases(sharding: NamedSharding) -> bool:
    """Return whether JAX may take the memory of a NumPy array for its own: on CPUs."""
    return next(iter(sharding.device_set)).platform == "cpu"


def client_of(device: jax.Device) -> Any:
    """Return what JAX manages devices of this kind with."""
    return device.client


def lock_or_warn(memory: np.ndarray, client: Any) -> bool | None:
    """Lock the pages of `memory`, so that GPUs can read them by themselves.

    client: of the devices, as JAX knows them (jax.Device.client).
    Return whether that was possible; a warning says why it was not. Return None for a CPU, to which
    nothing crosses a link.
    """
    if client.platform == "cpu":
        return None
    try:
        client.dma_map(memory.ctypes.data, memory.nbytes)
    except jax.errors.JaxRuntimeError as error:
        logging.log_first_n(
            logging.WARNING,
            "Images are streamed more slowly, from memory that is not page-locked: %s",
            1,
            error,
        )
        return False
    return True
