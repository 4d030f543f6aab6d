"""Which images a step sees, and in which batches test images come."""

import numpy as np

from cnn_spmd.data import order


def test_train_indices_are_a_function_of_seed_and_step():
    """43 images in batches of 8: an epoch has 5 steps and leaves 3 images out."""
    whole = order.train_indices(seed=3, step=0, steps=12, batch_size=8, examples=43)
    for start, n in ((0, 1), (4, 3), (7, 5)):
        got = order.train_indices(3, start, n, 8, 43)
        np.testing.assert_array_equal(got, whole[start : start + n])
    for epoch in (whole[:5], whole[5:10]):
        assert len(np.unique(epoch)) == 40
        assert epoch.max() < 43
    assert not np.array_equal(whole[:5], whole[5:10])
    assert not np.array_equal(whole, order.train_indices(4, 0, 12, 8, 43))


def test_some_images_are_held_out_at_first():
    """13 of 43 images are held out for 7 of 8 steps; epochs of 30 images, 3 steps.

    The 8th step begins an epoch of all images, 5 steps.
    """

    def indices(step, steps):
        return order.train_indices(3, step, steps, 8, 43, held_out=13, held_out_steps=7)

    whole = indices(0, 17)
    for start, n in ((0, 1), (2, 3), (6, 2), (9, 8)):
        np.testing.assert_array_equal(indices(start, n), whole[start : start + n])
    assert whole[:7].max() < 30
    assert whole[7:12].max() >= 30
    epochs = [whole[:3], whole[3:6], whole[7:12], whole[12:17]]
    for epoch in epochs:
        assert len(np.unique(epoch)) == epoch.size
    assert len({tuple(epoch[0]) for epoch in epochs}) == 4
    for_no_steps = order.train_indices(3, 0, 9, 8, 43, held_out=13)
    np.testing.assert_array_equal(for_no_steps, order.train_indices(3, 0, 9, 8, 43))


def test_eval_indices_see_every_image_once():
    for examples in (1, 7, 8, 43):
        indices, mask = order.eval_indices(8, examples)
        np.testing.assert_array_equal(indices[mask], np.arange(examples))
        assert indices.shape == mask.shape == (-(-examples // 8), 8)
        assert indices.max() < examples
