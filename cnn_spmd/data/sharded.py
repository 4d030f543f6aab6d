"""Keep a data set in shards over all devices, and exchange the images of each step.

Image i lies on device i % D, in row i // D. Neighbours in the data set thus lie on different
devices, and a batch that is in order takes equally many images from each of them.

The host knows all indices, and says for each step which rows every device sends to every other.
The devices gather these rows, do one all-to-all, and gather their batch from what they received.
The all-to-all has a fixed shape: each device sends `capacity` images to each device. That is the
largest number that any step of the run needs; where a step needs fewer, the rest is padding.

XLA's own gather from a split array is not used: every device looks up the whole global batch, with
zeros for images that it lacks, and XLA all-reduces the result. For D = 8 and b = 512 a ring then
sends ten times as many bytes. A ragged all-to-all would need no padding, but XLA's CPU backend has
none.

Shapes: N examples of a split, D devices, R = N / D rows per device (rounded up), S steps of a
chunk, B global batch, b per-device batch, M capacity, H height, W width, C channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cnn_spmd.data.feed import DeviceData, Feed, gather, labels_of, put
from cnn_spmd.errors import UserError
from cnn_spmd.sharding.placement import Placement

# The host reads and sends this many bytes of images at once: enough to keep all cores busy, little
# beside its memory.
PIECE_BYTES = 1e9


class Exchange(NamedTuple):
    """How the devices get the images of a step; for a chunk, each array has S in front."""

    indices: jax.Array  # int32 [B]: the examples, for their labels
    sent_rows: jax.Array  # int32 [D, D, M]: what each device (the first D) sends to each device
    slots: jax.Array  # int32 [D, b]: the places of a device's batch among the images it receives


# What names the examples of a step: of resident, sharded and streamed data, in this order.
Indices = jax.Array | Exchange | None


def exchanged(
    place: Placement, data: DeviceData, exchange: Indices
) -> tuple[DeviceData, jax.Array | None]:
    """Return the examples of a step and None, as for streamed data, where there is an Exchange.

    Otherwise return `data` and the indices as they are. Call it inside a jitted function. Images
    are uint8 [B, H, W, C] along conv_batch, labels int32 [B].
    """
    if not isinstance(exchange, Exchange):
        return data, exchange
    every_axis = place.mesh.axis_names
    image_shape = data.images.shape[2:]

    def on_device(images_R1HWC, sent_rows_1DM, slots_1b):
        sent = images_R1HWC[sent_rows_1DM[0], 0]  # [D, M, H, W, C]
        received = jax.lax.all_to_all(sent, every_axis, 0, 0, tiled=True)
        return received.reshape(-1, *image_shape)[slots_1b[0]]

    images_BHWC = jax.shard_map(
        on_device,
        mesh=place.mesh,
        in_specs=(P(None, every_axis), P(every_axis), P(every_axis)),
        out_specs=place.spec(
            ("conv_batch", None, None, None), (*exchange.indices.shape, *image_shape)
        ),
        check_vma=False,  # devices that share a part of the batch receive the same images
    )(data.images, exchange.sent_rows, exchange.slots)
    return DeviceData(images_BHWC, labels_of(data, exchange.indices)), None


@dataclasses.dataclass
class Sharded(Feed):
    """A split of the data set in shards over all devices; a program takes an Exchange."""

    # Returns the indices of all steps that the run will do, as arrays [S, B].
    run_indices: Callable[[], Iterable[np.ndarray]]

    # Images [R, D, H, W, C] split along D, and all labels [N] on every device, after `load`.
    data: DeviceData | None = dataclasses.field(default=None, init=False)

    @functools.cached_property
    def capacity(self) -> int:
        """Return the most images that a device sends to another in any step of the run."""
        return max(most_sent(indices, self._positions(indices)) for indices in self.run_indices())

    @property
    def exchanged_bytes(self) -> int:
        """Return one device's payload of a step's all-to-all: capacity images per device."""
        return self.place.mesh.size * self.capacity * self.images[0].nbytes

    def load(self) -> None:
        """Put each device's shard there, piece by piece: the host never holds a copy of it all."""
        shape, sharding = self._images_shape(), self._split(1)
        rows, devices = shape[:2]
        # The padding at the end repeats the first images.
        order = np.arange(rows * devices).reshape(rows, devices) % len(self.images)
        piece_rows = max(1, int(PIECE_BYTES / (devices * self.images[0].nbytes)))
        zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)
        write = jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnums=3, donate_argnums=0)
        images = zeros(shape, self.images.dtype)
        for start in range(0, rows, piece_rows):
            piece = gather(self.images, order[start : start + piece_rows], sharding)
            jax.block_until_ready(images)  # the devices hold at most two pieces beside the shard
            images = write(images, piece, start, 0)
        self.data = DeviceData(images, put(self.labels, self.place.replicated))

    def shapes(self, *shape: int) -> tuple[DeviceData, Exchange]:
        """Return shapes, dtypes and shardings of what `calls` yields.

        shape: of the indices that one call of a program takes, [B] or [S, B].
        """

        def abstract(array_shape, dtype, sharding):
            return jax.ShapeDtypeStruct(array_shape, dtype, sharding=sharding)

        data = DeviceData(
            abstract(self._images_shape(), self.images.dtype, self._split(1)),
            abstract(self.labels.shape, self.labels.dtype, self.place.replicated),
        )
        devices = self.place.mesh.size
        *chunk, batch = shape
        per_device = self.sharding("conv_batch", (batch,)).shard_shape((batch,))
        split = self._split(len(chunk))
        exchange = Exchange(
            abstract(shape, jnp.int32, self.place.replicated),
            abstract((*chunk, devices, devices, self.capacity), jnp.int32, split),
            abstract((*chunk, devices, *per_device), jnp.int32, split),
        )
        return data, exchange

    def call(self, indices: np.ndarray) -> tuple[DeviceData, Exchange]:
        """Return the data and the Exchange that a program takes, for one call of it."""
        sent_rows, slots = sent_and_slots(indices, self._positions(indices), self.capacity)
        split = self._split(indices.ndim - 1)
        exchange = Exchange(
            put(indices, self.place.replicated), put(sent_rows, split), put(slots, split)
        )
        return self.data, exchange

    def _images_shape(self) -> tuple[int, ...]:
        devices = self.place.mesh.size
        return -(-len(self.images) // devices), devices, *self.images.shape[1:]

    def _split(self, dimension: int) -> NamedSharding:
        """Return the sharding of an array with one entry per device in this dimension."""
        mesh = self.place.mesh
        return NamedSharding(mesh, P(*(None,) * dimension, mesh.axis_names))

    def _positions(self, indices: np.ndarray) -> np.ndarray:
        """Return which examples of the global batch each device needs, int [D, b]."""
        batch = indices.shape[-1]
        parts = self.sharding("conv_batch", (batch,)).devices_indices_map((batch,))
        every_position = np.arange(batch)
        return np.stack([every_position[parts[device]] for device in self.place.mesh.devices.flat])


def most_sent(indices: np.ndarray, positions: np.ndarray) -> int:
    """Return the most images that one device sends to another in one of the steps.

    indices: int32 [S, B]. positions: which of a batch each device needs, int [D, b].
    """
    devices = len(positions)
    owner = (indices[:, positions] % devices).reshape(-1, positions.shape[1])  # [S * D, b]
    pair = owner + devices * np.arange(len(owner))[:, None]
    return int(np.bincount(pair.ravel()).max())


def sent_and_slots(
    indices: np.ndarray, positions: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return `sent_rows` and `slots` of an Exchange, for indices [B] or [S, B].

    positions: which of a batch each device needs, int [D, b]. Raises UserError where a device
    would send more than `capacity` images to another.
    """
    devices = len(positions)
    needed = indices.reshape(-1, indices.shape[-1])[:, positions]  # [S, D, b]
    owner, row = needed % devices, needed // devices
    rank = rank_among_equals(owner)
    if rank.max() >= capacity:
        raise UserError(
            f"data.resident=sharded: a step takes {rank.max() + 1} images from one device, but the "
            f"program is for {capacity}: set steps to as many as you train"
        )
    sent_rows = np.zeros((len(needed), devices, devices, capacity), np.int32)
    step, receiver = np.ogrid[: len(needed), :devices]
    sent_rows[step[..., None], owner, receiver[..., None], rank] = row
    slots = (owner * capacity + rank).astype(np.int32)
    chunk = indices.shape[:-1]
    return sent_rows.reshape(*chunk, *sent_rows.shape[1:]), slots.reshape(*chunk, *slots.shape[1:])


def rank_among_equals(values: np.ndarray) -> np.ndarray:
    """Count, for each element, the equal ones before it along the last dimension.

    values: integers from 0 to below 2**16.
    """
    order = values.astype(np.uint16).argsort(-1, kind="stable")  # a radix sort, for 16 bits
    in_order = np.take_along_axis(values, order, -1)
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    is_first = np.diff(in_order, axis=-1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(is_first, place, 0), -1)
    rank = np.empty_like(values)
    np.put_along_axis(rank, order, place - first, -1)
    return rank
