"""Images on their way to the devices.

Each process reads what its devices hold, once, and in time.
"""

import threading

import jax
import numpy as np
import pytest

from cnn_spmd.data import streaming
from cnn_spmd.data.feed import Resident, gather, read_examples
from cnn_spmd.data.streaming import Streamed
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.placement import Placement


class Recorded:
    """An array that remembers which examples were read."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def take(self, indices, **how):
        self.read.append(indices)
        return self.array.take(indices, **how)


IMAGES = np.random.default_rng(0).integers(256, size=(20, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.int32)


# Under "data" the batch is split over 8 devices. Under "model" it is split over 4, and each part
# lies on two devices.
@pytest.mark.parametrize(("parallelism", "parts"), [("data", 8), ("model", 4)])
def test_each_example_is_read_once(parallelism, parts):
    place = Placement(mesh.make(4, 2), parallelism)
    indices = np.random.default_rng(1).permutation(20)[:16].reshape(2, 8).astype(np.int32)
    images, streamed = Recorded(IMAGES), Recorded(IMAGES)
    axes = (None, "conv_batch", None, None, None)
    found = [gather(images, indices, place.sharding(axes, (2, 8, 4, 4, 3)))]
    found += [data.images for data, _ in Streamed(place, streamed, LABELS).calls([indices])]
    # What is streamed is read by several threads only if it has more examples.
    for array, source, reads in zip(found, (images, streamed), (parts, 1), strict=True):
        np.testing.assert_array_equal(array, IMAGES[indices])
        assert sorted(np.concatenate(source.read)) == sorted(indices.ravel())
        assert len(source.read) == reads


def test_many_readers_of_a_file(tmp_path):
    """Each thread reads 16 examples or more, and the last one reads what is left."""
    images = np.random.default_rng(0).integers(256, size=(300, 2, 2, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    indices = np.random.default_rng(1).integers(300, size=(3, 59))
    for array in (np.load(tmp_path / "images.npy", mmap_mode="r"), images, np.arange(300)):
        np.testing.assert_array_equal(read_examples(array, indices), np.asarray(array)[indices])


@pytest.mark.parametrize("kind", [Resident, Streamed])
@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_a_call_takes_what_its_program_was_compiled_for(kind, shape):
    feed = kind(Placement(mesh.make(4, 2), "hybrid"), IMAGES, LABELS)
    feed.load()
    order = np.arange(8 * len(shape) ** 2)[: np.prod(shape)].reshape(shape).astype(np.int32) % 20
    (call,) = feed.calls([order])
    (found, indices), (expected, expected_indices) = call, feed.shapes(*shape)
    for array, form in zip((*found, indices), (*expected, expected_indices), strict=True):
        if form is None:
            assert array is None
            continue
        assert (array.shape, array.dtype) == (form.shape, form.dtype)
        assert array.sharding == form.sharding
    if kind is Streamed:
        # 8 devices share the images' batch, and 4 the labels', as the last dense layer has it.
        for array, per_device in ((found.images, 1), (found.labels, 2)):
            shard = array.sharding.shard_shape(array.shape)
            assert shard[: len(shape)] == (*shape[:-1], per_device)
        np.testing.assert_array_equal(found.images, IMAGES[order])
        np.testing.assert_array_equal(found.labels, LABELS[order])


class Copying:
    """Stand in for an array on a GPU: the host's memory is read as late as possible."""

    def __init__(self, shape, sharding, shard):
        indices = sharding.addressable_devices_indices_map(shape).values()
        self.shards = [(index, shard(index)) for index in indices]
        self.found = None

    def block_until_ready(self):
        if self.found is None:
            self.found = [(index, memory.copy()) for index, memory in self.shards]
        return self


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("parallelism", ["data", "model"])
def test_buffers_are_not_filled_before_they_are_copied(parallelism, asynchronous, monkeypatch):
    """The chunks differ in length, so that buffers grow and are used in part.

    Where the copy is not asynchronous, the arrays are JAX's own on the CPU, which must not lie in
    the buffers. The length of a shard, 48 bytes or 144, puts some of them where JAX could do that.
    """
    if asynchronous:
        monkeypatch.setattr(streaming, "aliases", lambda sharding: False)
        monkeypatch.setattr(jax, "make_array_from_callback", Copying)
    generator = np.random.default_rng(1)
    order = [generator.integers(20, size=(steps, 8)) for steps in (1, 3, 3, 2, 3, 1, 3)]
    calls = Streamed(Placement(mesh.make(4, 2), parallelism), IMAGES, LABELS).calls(order)
    for (data, _), indices in zip(list(calls), order, strict=True):
        if not asynchronous:
            np.testing.assert_array_equal(data.images, IMAGES[indices])
            continue
        for index, shard in data.images.block_until_ready().found:
            np.testing.assert_array_equal(shard, IMAGES[indices][index])


def test_two_calls_are_made_while_one_runs():
    """One is being copied, and one is being gathered."""
    place, made = Placement(mesh.make(1, 1), "data"), [threading.Event() for _ in range(5)]

    def indices():
        for event in made:
            yield np.arange(2, dtype=np.int32)
            event.set()  # the feed has asked for the one after it

    calls = Streamed(place, IMAGES, LABELS).calls(indices())
    next(calls)
    assert [event.is_set() for event in made] == [True, True, False, False, False]
    assert len(list(calls)) == 4


def test_a_feed_that_is_left_early_leaves_no_thread():
    place, order = Placement(mesh.make(4, 2), "data"), [np.arange(8, dtype=np.int32)] * 5
    for feed in (Streamed(place, IMAGES, LABELS), Resident(place, IMAGES, LABELS)):
        list(feed.calls(order))  # starts the readers, which stay
        threads = threading.active_count()
        calls = feed.calls(order)
        next(calls)
        assert threading.active_count() == threads + 1
        calls.close()
        assert threading.active_count() == threads


def test_what_goes_wrong_while_reading_is_raised():
    class Damaged(Recorded):
        def take(self, *_, **how):
            raise OSError("Input/output error")

    place = Placement(mesh.make(1, 1), "data")
    calls = Streamed(place, Damaged(IMAGES), LABELS).calls([np.arange(2)] * 3)
    with pytest.raises(OSError, match="Input/output error"):
        next(calls)


class Client:
    """A client of GPUs that locks pages, or refuses to."""

    platform = "cuda"

    def __init__(self, refuses: bool):
        self.refuses, self.locked = refuses, set()

    def dma_map(self, address, size):
        if self.refuses:
            raise jax.errors.JaxRuntimeError("out of memory")
        self.locked.add(address)

    def dma_unmap(self, address):
        self.locked.remove(address)


@pytest.mark.parametrize(("refuses", "warning"), [(False, []), (True, ["out of memory"])])
def test_memory_is_page_locked_or_a_warning_says_why_not(refuses, warning, monkeypatch):
    """As on a GPU. What is locked is unlocked in the end."""
    client, said, seen = Client(refuses), [], []
    monkeypatch.setattr(streaming, "client_of", lambda device: client)
    monkeypatch.setattr(
        streaming.logging, "log_first_n", lambda level, text, n, error: said.append(str(error))
    )
    feed = Streamed(Placement(mesh.make(1, 1), "data"), IMAGES, LABELS)
    for _ in feed.calls([np.arange(2)] * 4):
        seen.append(len(client.locked))
    assert feed.page_locked is not refuses
    assert said == warning * 2  # one for each buffer, and the log shows the first
    assert seen[-1] == (0 if refuses else streaming.BUFFERS)
    assert client.locked == set()
