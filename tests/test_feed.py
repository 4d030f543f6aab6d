"""Images on their way to the devices.

Each process reads what its devices hold, once, and one call ahead.
"""

import threading

import numpy as np
import pytest

from cnn_spmd.data.feed import Feed, gather, read_examples
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
    place, images = Placement(mesh.make(4, 2), parallelism), Recorded(IMAGES)
    indices = np.random.default_rng(1).permutation(20)[:16].reshape(2, 8).astype(np.int32)
    axes = (None, "conv_batch", None, None, None)
    found = gather(images, indices, place.sharding(axes, (2, 8, 4, 4, 3)))
    np.testing.assert_array_equal(found, IMAGES[indices])
    assert sorted(np.concatenate(images.read)) == sorted(indices.ravel())
    assert len(images.read) == parts


def test_many_readers_of_a_file(tmp_path):
    """Each thread reads 16 examples or more, and the last one reads what is left."""
    images = np.random.default_rng(0).integers(256, size=(300, 2, 2, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    indices = np.random.default_rng(1).integers(300, size=(3, 59))
    for array in (np.load(tmp_path / "images.npy", mmap_mode="r"), images, np.arange(300)):
        np.testing.assert_array_equal(read_examples(array, indices), np.asarray(array)[indices])


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_a_call_takes_what_its_program_was_compiled_for(resident, shape):
    feed = Feed(Placement(mesh.make(4, 2), "hybrid"), IMAGES, LABELS, resident)
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
    if not resident:
        # 8 devices share the images' batch, and 4 the labels', as the last dense layer has it.
        for array, per_device in ((found.images, 1), (found.labels, 2)):
            shard = array.sharding.shard_shape(array.shape)
            assert shard[: len(shape)] == (*shape[:-1], per_device)
        np.testing.assert_array_equal(found.images, IMAGES[order])
        np.testing.assert_array_equal(found.labels, LABELS[order])


def test_the_next_call_is_made_while_this_one_runs():
    place, made = Placement(mesh.make(1, 1), "data"), [threading.Event() for _ in range(4)]

    def indices():
        for event in made:
            yield np.arange(2, dtype=np.int32)
            event.set()  # the feed has asked for the one after it

    calls = Feed(place, IMAGES, LABELS, resident=False).calls(indices())
    next(calls)
    # The second call is being prepared, and no further one.
    assert [event.is_set() for event in made] == [True, False, False, False]
    assert len(list(calls)) == 3


def test_what_goes_wrong_while_reading_is_raised():
    class Damaged(Recorded):
        def take(self, *_, **how):
            raise OSError("Input/output error")

    place = Placement(mesh.make(1, 1), "data")
    calls = Feed(place, Damaged(IMAGES), LABELS, resident=False).calls([np.arange(2)] * 3)
    with pytest.raises(OSError, match="Input/output error"):
        next(calls)
