"""Crops, mirrors, test views and normalisation, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from cnn_spmd.data import augment, statistics


def random_images(*shape: int) -> np.ndarray:
    """Return random uint8 images [N, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def crops_seen(got, images, indices, side: tuple[int, int], pad: int) -> set[tuple]:
    """Return the (row, column, direction) of each crop in `got` within its image."""
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    height, width = side
    places = [
        (top, left, step)
        for top in range(padded.shape[1] - height + 1)
        for left in range(padded.shape[2] - width + 1)
        for step in (1, -1)
    ]
    seen = set()
    for image, index in zip(got, indices, strict=True):
        matches = []
        for top, left, step in places:
            crop = padded[index, top : top + height, left : left + width][:, ::step]
            if np.array_equal(image, crop):
                matches.append((top, left, step))
        assert matches
        seen.update(matches)
    return seen


def test_crop_and_flip_against_numpy():
    images = random_images(20, 9, 7)
    indices = jnp.array(np.random.default_rng(1).integers(0, 20, 600))
    got = np.asarray(augment.crop_and_flip(images, indices, jax.random.key(1), pad=2, flip=True))
    # Every crop, mirrored and not.
    assert len(crops_seen(got, images, indices, (9, 7), pad=2)) == 5 * 5 * 2
    plain = augment.crop_and_flip(images, indices, jax.random.key(1), pad=0, flip=False)
    np.testing.assert_array_equal(plain, images[np.asarray(indices)])


def test_a_crop_smaller_than_the_image():
    """4x4 from a 7x6 image; then with one reflected pixel around it."""
    images = random_images(3, 7, 6)
    indices = jnp.array(np.random.default_rng(1).integers(0, 3, 800))
    for pad, places in ((0, 4 * 3 * 2), (1, 6 * 5 * 2)):
        got = np.asarray(
            augment.crop_and_flip(images, indices, jax.random.key(1), side=4, pad=pad, flip=True)
        )
        assert got.shape == (800, 4, 4, 3)
        assert len(crops_seen(got, images, indices, (4, 4), pad)) == places


def test_half_of_the_images_are_mirrored():
    images = np.arange(4, dtype=np.uint8).reshape(1, 1, 4, 1)
    got = augment.crop_and_flip(images, jnp.zeros(4000, int), jax.random.key(1), pad=0, flip=True)
    assert abs((got[:, 0, 0, 0] == 3).mean() - 0.5) < 0.03


def test_eval_views():
    images = random_images(2, 8, 7)
    places = [(2, 1), (0, 0), (0, 3), (4, 0), (4, 3)]
    crops = [images[:, top : top + 4, left : left + 4] for top, left in places]
    mirrors = [crop[:, :, ::-1] for crop in crops]
    ten = np.asarray(augment.eval_views(images, 4, "ten", True))
    np.testing.assert_array_equal(ten, np.stack(crops + mirrors, 1))
    five = augment.eval_views(images, 4, "ten", False)
    np.testing.assert_array_equal(five, np.stack(crops, 1))
    mirrored = augment.eval_views(images, 0, "mirrored", True)
    np.testing.assert_array_equal(mirrored, np.stack([images, images[:, :, ::-1]], 1))
    for views, mirror in (("one", True), ("mirrored", False)):
        centre = augment.eval_views(images, 4, views, mirror)
        np.testing.assert_array_equal(centre, crops[0][:, None])


def test_the_centre_where_the_margin_is_odd():
    images = random_images(2, 9, 7)
    centre = augment.eval_views(images, 4, "one", True)[:, 0]
    np.testing.assert_array_equal(centre, images[:, 2:6, 1:5])


def test_normalise():
    images = random_images(50, 8, 8)
    mean, std = statistics.channel_statistics(images)
    normal = np.asarray(augment.normalise(jnp.asarray(images), mean, std))
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-5)
