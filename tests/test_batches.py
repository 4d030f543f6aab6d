import jax
import jax.numpy as jnp
import numpy as np

from cnn_spmd.data import augment as batches
from cnn_spmd.data import order, statistics


def test_train_indices_are_a_function_of_seed_and_step():
    whole = order.train_indices(
        seed=3, step=0, steps=12, batch_size=8, examples=43
    )  # 5 steps an epoch, 3 left out
    for start, n in ((0, 1), (4, 3), (7, 5)):
        np.testing.assert_array_equal(
            order.train_indices(3, start, n, 8, 43), whole[start : start + n]
        )
    for epoch in (whole[:5], whole[5:10]):
        assert len(np.unique(epoch)) == 40
        assert epoch.max() < 43
    assert not np.array_equal(whole[:5], whole[5:10])
    assert not np.array_equal(whole, order.train_indices(4, 0, 12, 8, 43))


def test_some_examples_are_held_out_at_first():
    """43 examples, 13 of them held out for 7 steps of 8 (3 an epoch of 30): the 8th step begins an epoch of all, 5 steps."""

    def indices(step, steps):
        return order.train_indices(3, step, steps, 8, 43, held_out=13, held_out_steps=7)

    whole = indices(0, 17)
    for start, n in ((0, 1), (2, 3), (6, 2), (9, 8)):
        np.testing.assert_array_equal(indices(start, n), whole[start : start + n])
    assert whole[:7].max() < 30
    assert whole[7:12].max() >= 30
    for epoch in (whole[:3], whole[3:6], whole[7:12], whole[12:17]):
        assert len(np.unique(epoch)) == epoch.size
    assert (
        len({tuple(epoch[0]) for epoch in (whole[:3], whole[3:6], whole[7:12], whole[12:17])}) == 4
    )
    np.testing.assert_array_equal(
        order.train_indices(3, 0, 9, 8, 43, held_out=13), order.train_indices(3, 0, 9, 8, 43)
    )


def test_eval_indices_see_every_example_once():
    for examples in (1, 7, 8, 43):
        indices, mask = order.eval_indices(8, examples)
        np.testing.assert_array_equal(indices[mask], np.arange(examples))
        assert indices.shape == mask.shape == (-(-examples // 8), 8)
        assert indices.max() < examples


def test_crop_and_flip_against_numpy():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 9, 7, 3), dtype=np.uint8)
    indices = jnp.array(rng.integers(0, 20, 600))
    got = np.asarray(batches.crop_and_flip(images, indices, jax.random.key(1), pad=2, flip=True))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    seen = set()
    for image, index in zip(got, indices, strict=True):
        matches = [
            (i, j, step)
            for i in range(5)
            for j in range(5)
            for step in (1, -1)
            if np.array_equal(image, padded[index, i : i + 9, j : j + 7][:, ::step])
        ]
        assert matches
        seen.update(matches)
    assert len(seen) == 50  # every crop, mirrored and not
    plain = batches.crop_and_flip(images, indices, jax.random.key(1), pad=0, flip=False)
    np.testing.assert_array_equal(plain, images[np.asarray(indices)])


def test_a_crop_smaller_than_the_image():
    """4x4 anywhere in a 7x6 image, whose border is the image's own; and with a reflected pixel around it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 7, 6, 3), dtype=np.uint8)
    indices = jnp.array(rng.integers(0, 3, 800))
    for pad, places in ((0, 4 * 3 * 2), (1, 6 * 5 * 2)):
        got = np.asarray(
            batches.crop_and_flip(images, indices, jax.random.key(1), side=4, pad=pad, flip=True)
        )
        assert got.shape == (800, 4, 4, 3)
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
        height, width = padded.shape[1:3]
        seen = set()
        for image, index in zip(got, indices, strict=True):
            matches = [
                (i, j, step)
                for i in range(height - 3)
                for j in range(width - 3)
                for step in (1, -1)
                if np.array_equal(image, padded[index, i : i + 4, j : j + 4][:, ::step])
            ]
            assert matches
            seen.update(matches)
        assert len(seen) == places


def test_eval_views():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 7, 3), dtype=np.uint8)
    ten = np.asarray(batches.eval_views(images, 4, "ten", True))
    places = [(2, 1), (0, 0), (0, 3), (4, 0), (4, 3)]
    expected = [images[:, i : i + 4, j : j + 4] for i, j in places]
    np.testing.assert_array_equal(
        ten, np.stack(expected + [view[:, :, ::-1] for view in expected], 1)
    )
    np.testing.assert_array_equal(
        batches.eval_views(images, 4, "ten", False), np.stack(expected, 1)
    )
    np.testing.assert_array_equal(
        batches.eval_views(images, 0, "mirrored", True), np.stack([images, images[:, :, ::-1]], 1)
    )
    for views, mirror in (("one", True), ("mirrored", False)):
        np.testing.assert_array_equal(
            batches.eval_views(images, 4, views, mirror), expected[0][:, None]
        )


def test_mean_image():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 6, 3), dtype=np.uint8)
    mean = images.astype(np.float64).mean(0)
    np.testing.assert_allclose(statistics.mean_image(images, 0), mean, rtol=1e-6)
    np.testing.assert_allclose(statistics.mean_image(images, 4), mean[2:6, 1:5], rtol=1e-6)
    assert statistics.mean_image(images, 4).dtype == np.float32


def test_normalise():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    mean, std = statistics.channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-6)
    normal = np.asarray(batches.normalise(jnp.asarray(images), mean, std))
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-5)


def test_statistics_of_large_sets_come_from_evenly_spaced_images(monkeypatch):
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    assert statistics.sample(images) is images
    for size, kept in (
        (28, [0, 1, 2, 3, 4, 5, 6]),
        (27, [0, 2, 4, 6]),
        (14, [0, 2, 4, 6]),
        (13, [0, 3, 6]),
    ):
        monkeypatch.setattr(statistics, "SAMPLE_BYTES", size)
        np.testing.assert_array_equal(statistics.sample(images), images[kept])


def test_statistics_in_parts(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    whole = [*statistics.channel_statistics(images), statistics.colour_axes(images)]
    monkeypatch.setattr(statistics, "BLOCK_BYTES", 2 * images[0].nbytes)
    parts = [*statistics.channel_statistics(images), statistics.colour_axes(images)]
    for got, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_half_of_the_images_are_mirrored():
    images = np.arange(4, dtype=np.uint8).reshape(1, 1, 4, 1)
    got = batches.crop_and_flip(images, jnp.zeros(4000, int), jax.random.key(1), pad=0, flip=True)
    assert abs((got[:, 0, 0, 0] == 3).mean() - 0.5) < 0.03


def test_statistics_of_grey_and_of_one_colour():
    rng = np.random.default_rng(0)
    for _ in range(20):  # some of whose variances come out below zero
        assert np.isfinite(
            statistics.colour_axes(
                np.repeat(rng.integers(0, 256, (10, 4, 4, 1), dtype=np.uint8), 3, -1)
            )
        ).all()
    np.testing.assert_array_equal(
        statistics.channel_statistics(np.full((2, 4, 4, 3), 7, np.uint8))[1], 1
    )


def test_the_centre_where_what_is_left_is_odd():
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        batches.eval_views(images, 4, "one", True)[:, 0], images[:, 2:6, 1:5]
    )
