"""Means, deviations and colour axes of training images."""

import numpy as np

from cnn_spmd.data import statistics


def test_mean_image():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 6, 3), dtype=np.uint8)
    mean = images.astype(np.float64).mean(0)
    np.testing.assert_allclose(statistics.mean_image(images, 0), mean, rtol=1e-6)
    np.testing.assert_allclose(statistics.mean_image(images, 4), mean[2:6, 1:5], rtol=1e-6)
    assert statistics.mean_image(images, 4).dtype == np.float32


def test_channel_statistics():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    mean, std = statistics.channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-6)


def test_statistics_of_large_sets_come_from_evenly_spaced_images(monkeypatch):
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    assert statistics.sample(images) is images
    for size, taken in (
        (28, [0, 1, 2, 3, 4, 5, 6]),
        (27, [0, 2, 4, 6]),
        (14, [0, 2, 4, 6]),
        (13, [0, 3, 6]),
    ):
        monkeypatch.setattr(statistics, "SAMPLE_BYTES", size)
        np.testing.assert_array_equal(statistics.sample(images), images[taken])


def test_statistics_in_parts(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    whole = [*statistics.channel_statistics(images), statistics.colour_axes(images)]
    monkeypatch.setattr(statistics, "BLOCK_BYTES", 2 * images[0].nbytes)
    parts = [*statistics.channel_statistics(images), statistics.colour_axes(images)]
    for got, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_statistics_of_grey_and_of_one_colour():
    rng = np.random.default_rng(0)
    # Rounding makes some variances of grey images negative.
    for _ in range(20):
        grey = np.repeat(rng.integers(0, 256, (10, 4, 4, 1), dtype=np.uint8), 3, -1)
        assert np.isfinite(statistics.colour_axes(grey)).all()
    one_colour = np.full((2, 4, 4, 3), 7, np.uint8)
    np.testing.assert_array_equal(statistics.channel_statistics(one_colour)[1], 1)
