import jax
import jax.numpy as jnp
import numpy as np

from cnn_spmd.data import batches


def test_train_indices_are_a_function_of_seed_and_step():
    whole = batches.train_indices(seed=3, step=0, steps=12, batch_size=8, examples=43)  # 5 steps an epoch, 3 left out
    for start, n in ((0, 1), (4, 3), (7, 5)):
        np.testing.assert_array_equal(batches.train_indices(3, start, n, 8, 43), whole[start:start + n])
    for epoch in (whole[:5], whole[5:10]):
        assert len(np.unique(epoch)) == 40
        assert epoch.max() < 43
    assert not np.array_equal(whole[:5], whole[5:10])
    assert not np.array_equal(whole, batches.train_indices(4, 0, 12, 8, 43))


def test_eval_indices_see_every_example_once():
    for examples in (1, 7, 8, 43):
        indices, mask = batches.eval_indices(8, examples)
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
        matches = [(i, j, step) for i in range(5) for j in range(5) for step in (1, -1)
                   if np.array_equal(image, padded[index, i:i + 9, j:j + 7][:, ::step])]
        assert matches
        seen.update(matches)
    assert len(seen) == 50  # every crop, mirrored and not
    plain = batches.crop_and_flip(images, indices, jax.random.key(1), pad=0, flip=False)
    np.testing.assert_array_equal(plain, images[np.asarray(indices)])


def test_normalise():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    mean, std = batches.channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-6)
    normal = np.asarray(batches.normalise(jnp.asarray(images), mean, std))
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-5)
