"""A data set in shards: what the devices send, and numbers equal to those of resident data."""

import functools
import types

import jax
import numpy as np
import pytest
from setups import gather, narrow, setup_of, trained  # noqa: F401

from cnn_spmd import config as configs
from cnn_spmd.data import sharded
from cnn_spmd.data.feed import Resident
from cnn_spmd.errors import UserError
from cnn_spmd.training import build
from cnn_spmd.training.evaluate import Evaluator

# Three steps of 24 examples, the last 72 of 90.
INDICES = np.random.default_rng(0).permutation(np.arange(18, 90)).reshape(3, 24).astype(np.int32)
SIDE = 8  # of images: XLA's loops are slow on a CPU


@pytest.mark.parametrize(
    ("parallelism", "shape", "changes"),
    [
        ("hybrid", (4, 2), dict(dense_microbatch=8)),
        ("model", (2, 4), {}),  # four devices need the same images
        ("data", (8, 1), dict(eval=dict(views="mirrored"))),
    ],
)
def test_numbers_are_those_of_resident_data(monkeypatch, parallelism, shape, changes):
    """To the last bit, in training (with crops, flips, dropout) and in evaluation.

    The program moves the bytes that theory says: the devices send as many images to each other as
    the fullest step needs.
    """
    monkeypatch.setattr(sharded, "PIECE_BYTES", 8 * 3 * SIDE * SIDE * 3)  # 3 of a device's 8 images
    resident, split = (
        setup_of(
            "simple_cnn",
            parallelism,
            shape,
            dtype="float32",
            steps_per_call=2,
            data=dict(resident=choice, synthetic=dict(image_size=SIDE)),
            **changes,
        )
        for choice in ("yes", "sharded")
    )
    expected, got = results_of(resident), results_of(split)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    feed, _ = split.feeds
    shards = {shard.data.shape for shard in feed.data.images.addressable_shards}
    assert shards == {(8, 1, SIDE, SIDE, 3)}

    report = split.report()
    axes = [axis for axis, size in zip(("data", "model"), shape, strict=True) if size > 1]
    (images,) = (row for row in report["closed_form"] if row["what"] == "images")
    assert (images["operation"], images["axes"]) == ("all-to-all", axes)
    assert images["bytes"] == 8 * feed.capacity * SIDE * SIDE * 3
    assert images["ring_bytes"] == 7 * feed.capacity * SIDE * SIDE * 3
    (moved,) = (
        row for row in report["communication"] if (row["kind"], row["axes"]) == ("all-to-all", axes)
    )
    assert moved["compiled_bytes"] == moved["closed_form_bytes"] >= images["bytes"]
    assert report["data_on_device"]
    assert report["image_bytes_per_device"] == (8 + 1) * SIDE * SIDE * 3


def results_of(setup: build.Setup) -> dict:
    """Return by name the numbers of two steps and of an evaluation of a new state."""
    losses, params = trained(setup, 2)
    evaluate = Evaluator(setup, setup.lower_evaluation().compile())
    evaluate.feed.load()
    return params | dict(losses=losses) | evaluate(setup.init())


@pytest.mark.parametrize("conv_batch", ["data", None, ("model", "data")])
def test_rows_of_ones_own(conv_batch):
    """Each device gets its shard of the batch, whichever mesh axes split it."""
    setup = setup_of("simple_cnn", "data", (4, 2), data=dict(resident="sharded"))
    place = build.Placement(setup.place.mesh, "mine", dict(mine=dict(conv_batch=conv_batch)))
    images = np.arange(90, dtype=np.uint8).reshape(90, 1, 1, 1)
    feed = sharded.Sharded(place, images, np.arange(90, dtype=np.int32), lambda: [INDICES])
    feed.load()
    exchange = jax.jit(functools.partial(sharded.exchanged, place))
    for indices, call in zip(INDICES, feed.calls(INDICES), strict=True):
        for array, form in zip(
            jax.tree.leaves(call), jax.tree.leaves(feed.shapes(24)), strict=True
        ):
            assert (array.shape, array.dtype) == (form.shape, form.dtype)
            assert array.sharding == form.sharding
        found, no_exchange = exchange(*call)
        assert no_exchange is None
        for shard in found.images.addressable_shards:
            np.testing.assert_array_equal(shard.data.ravel(), indices[shard.index[0]])
        np.testing.assert_array_equal(found.labels, indices)


def test_the_exchange_of_a_chunk_by_hand():
    """Two devices, images of two steps; device 1 holds the odd ones."""
    indices = np.array([[0, 2, 1, 4], [5, 3, 1, 0]])
    positions = np.array([[0, 1], [2, 3]])
    assert sharded.most_sent(indices, positions) == 2
    sent_rows, slots = sharded.sent_and_slots(indices, positions, 2)
    # [step][sender][receiver]: images 0 and 2 are rows 0 and 1 of device 0.
    assert sent_rows.tolist() == [
        [[[0, 1], [2, 0]], [[0, 0], [0, 0]]],
        [[[0, 0], [0, 0]], [[2, 1], [0, 0]]],
    ]
    # What device 1 sent comes after the two images of device 0.
    assert slots.tolist() == [[[0, 1], [2, 0]], [[2, 3], [2, 0]]]
    with pytest.raises(UserError, match=r"takes 2 images from one device, .* for 1: set steps"):
        sharded.sent_and_slots(indices, positions, 1)


def test_a_batch_in_order_takes_equally_many_from_each_device():
    """As the evaluation's does; its padding begins with the first images again."""
    setup = setup_of("simple_cnn", "data", (8, 1), data=dict(resident="sharded"), batch_size=64)
    _, test_feed = setup.feeds
    assert test_feed.capacity == 1
    assert test_feed.exchanged_bytes == 8 * 32 * 32 * 3


def test_on_one_device_the_programs_are_those_of_resident_data():
    setup = setup_of("simple_cnn", "data", (1, 1), data=dict(resident="sharded"))
    assert [type(feed) for feed in setup.feeds] == [Resident] * 2


@pytest.mark.parametrize(
    ("gigabytes", "devices", "resident"),
    [(43, 8, "no"), (44, 8, "sharded"), (700, 8, "yes"), (500, 1, "no"), (None, 8, "no")],
)
def test_auto_takes_what_fits(config, gigabytes, devices, resident):
    """ImageNet at 256 pixels: 262 GB in all, 32.7 GB on each of eight devices."""
    data = types.SimpleNamespace(
        fallback=None,
        train_images=np.broadcast_to(np.uint8(0), (1_281_167, 256, 256, 3)),
        test_images=np.broadcast_to(np.uint8(0), (50_000, 256, 256, 3)),
    )
    memory = gigabytes and 1e9 * gigabytes
    got = configs.resolve(config, data, "gpu", memory, devices)
    assert got.data.resident == resident


@pytest.mark.parametrize(("resident", "images"), [("sharded", 27_648), ("yes", 8 * 27_648)])
def test_images_that_do_not_fit_are_refused(resident, images, monkeypatch):
    setup = setup_of("simple_cnn", "data", (8, 1), data=dict(resident=resident))
    monkeypatch.setattr(configs, "machine_memory", lambda: 8 * images)
    monkeypatch.setattr(build.program, "bytes_per_device", lambda tree: 0)
    build.refuse_beyond_memory(setup)
    monkeypatch.setattr(configs, "machine_memory", lambda: 8 * images - 8)
    message = f"data.resident={resident}, mesh 8x1, per device: needs 0.0 GB, expected at most"
    with pytest.raises(UserError, match=message):
        build.refuse_beyond_memory(setup)
