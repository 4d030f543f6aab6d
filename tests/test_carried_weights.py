"""Weights that are cast once per step: the float32 ones stay, and the step is the same."""

import jax
import numpy as np
import pytest
from setups import (
    assert_close,
    gather,
    narrow,  # noqa: F401  (a fixture)
    setup_of,
)

from cnn_spmd.training import step
from cnn_spmd.training.step import StepFunctions


def trained_in_bfloat16(fast_forms: tuple[str, ...], **fields: object) -> tuple:
    """Return losses and parameters of two steps in one program, on a mesh of 4."""
    setup = setup_of(
        "shallow", "hybrid", (2, 2), fast_forms, dtype="bfloat16", steps_per_call=2, **fields
    )
    state, metrics = setup.train(setup.init(), 2)
    return metrics["loss"], gather(state.params)


@pytest.mark.parametrize(
    "fields", [{}, dict(dense_microbatch=8), dict(dense_microbatch=8, dense_updates="sum")]
)
def test_carried_weights_change_nothing(monkeypatch, fields):
    monkeypatch.setattr(step, "LARGE", 100)  # the networks of tests are narrow
    plain_loss, plain = trained_in_bfloat16(("own_gradients",), **fields)
    cast_loss, cast = trained_in_bfloat16(("own_gradients", "carry_bf16"), **fields)
    np.testing.assert_allclose(plain_loss, cast_loss, rtol=1e-5)
    assert_close(cast, plain, 1e-3)
    for weight in jax.tree.leaves(cast):  # float32, not what a bfloat16 can hold
        assert (np.asarray(weight).view(np.int32) & 0xFFFF).any()


def test_layers_read_large_kernels_in_bfloat16(monkeypatch):
    monkeypatch.setattr(step, "LARGE", 100)
    seen = []
    features = StepFunctions.features

    def spy(self, params, *args):
        seen.append(params)
        return features(self, params, *args)

    monkeypatch.setattr(StepFunctions, "features", spy)
    setup = setup_of("alexnet", "data", (1, 1), dtype="bfloat16")
    setup.lower_train(2)
    dtypes = {(leaf.size >= 100, str(leaf.dtype)) for leaf in jax.tree.leaves(seen)}
    assert dtypes == {(True, "bfloat16"), (False, "float32")}


def test_only_large_kernels_are_carried(monkeypatch):
    """An array that the loop carries twice costs a copy per step."""
    monkeypatch.setattr(step, "LARGE", 100)
    functions = setup_of("alexnet", "data", (1, 1), dtype="bfloat16").functions
    params = functions.abstract_state.params
    carried = jax.tree.leaves(jax.eval_shape(functions.cast, params))
    assert {str(leaf.dtype) for leaf in carried} == {"bfloat16"}
    assert len(carried) == sum(leaf.size >= 100 for leaf in jax.tree.leaves(params))
