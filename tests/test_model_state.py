"""Model state: the running averages of batch norm, on meshes and across checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import (
    begin,
    gather,
    narrow,  # noqa: F401  (a fixture)
    setup_of,
)

from cnn_spmd.training import checkpoint

SCORES = "scores"


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """Two steps, a step on another mesh, one on the first again: as four steps on one device.

    So are the test scores, which depend on the running averages. The dense layer sees
    micro-batches. Whole batches: test_schemes.py and test_checkpoint.py.
    """
    meshes = (("data", (1, 1)), ("spatial", (2, 2)), ("hybrid", (1, 2)))
    with jax.enable_x64(True):
        one, spatial, hybrid = (setup_of("normed", *mesh, dense_microbatch=8) for mesh in meshes)
        expected, _ = one.train(begin(one), 4)
        state, _ = spatial.train(begin(spatial), 2)
        assert restored(tmp_path, spatial, save=state) is None
        state, _ = hybrid.train(restored(tmp_path, hybrid), 1)
        restored(tmp_path, hybrid, save=state)
        state, _ = spatial.train(restored(tmp_path, spatial), 1)
        expected_results = scores_and_state(one, expected)
        assert_alike(scores_and_state(spatial, state), expected_results)
        fresh = expected._replace(model_state=begin(one).model_state)
        scores, others = (
            results[SCORES] for results in (expected_results, scores_and_state(one, fresh))
        )
        assert np.abs(scores - others).max() > 1e-3


def restored(tmp_path, setup, save=None):
    """Return the state of the newest checkpoint, or None, on a mesh; then save a state."""
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 1, "mine")
    found = checkpoints.restore(setup.functions.abstract_state)
    if save is not None:
        checkpoints.save(int(save.step), save, None)
    checkpoints.close()
    return found


def scores_and_state(setup, state) -> dict[str, np.ndarray]:
    """Return the scores of the test images and the state, by name."""
    scores = jax.jit(setup.functions.scores)(state, setup.data.test_images)
    return gather(state) | {SCORES: np.asarray(scores)}


def assert_alike(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_statistics_per_device_depend_on_the_number_of_shards_of_the_batch():
    """Two meshes that split the batch in two compute the same; one device another."""
    per_device = dict(model=dict(name="resnet_8", width=64, batch_norm="per_device"))
    with jax.enable_x64(True):
        setups = [
            setup_of("resnet_8", parallelism, shape, **per_device)
            for parallelism, shape in (("data", (2, 1)), ("model", (2, 2)), ("data", (1, 1)))
        ]
        along_data, with_model, one = (gather(setup.train(begin(setup), 2)) for setup in setups)
        report = setups[0].report()
    assert_alike(along_data, with_model)
    name = next(name for name in one if "norm7" in name and "mean" in name)
    assert np.abs(one[name] - along_data[name]).max() > 1e-4
    assert report["closed_form_not_covered"] is None
    for row in report["communication"]:
        assert row["compiled_bytes"] == pytest.approx(row["closed_form_bytes"], abs=100)


def test_running_averages_stay_in_float32():
    setup = setup_of("resnet_8", "data", (1, 1), dtype="bfloat16")
    abstract = jax.eval_shape(
        lambda state: setup.functions.features(
            state.params, state.model_state, jnp.zeros((4, 16, 16, 3))
        ),
        setup.functions.abstract_state,
    )
    x_BF, model_state = abstract
    assert x_BF.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(model_state)} == {jnp.dtype("float32")}
