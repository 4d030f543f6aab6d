"""Weights in two halves: the bits that they keep, and the steps that hand them on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import (
    assert_close,
    gather,
    narrow,  # noqa: F401  (a fixture)
    setup_of,
)

from cnn_spmd.analysis import program
from cnn_spmd.training.packing import pack_bf16, unpack_f32
from cnn_spmd.training.step import StepFunctions


def weights_of_all_kinds() -> np.ndarray:
    """Return float32 bits: ordinary numbers, extremes, ties, exact bfloat16; no NaN."""
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, np.inf, -np.inf, 3e38]
    weights = np.concatenate([rng.normal(size=5000), 10.0 ** rng.uniform(-38, 38, 500), special])
    bits = weights.astype(np.float32).view(np.int32)
    exact = bits & -(2**16)
    ties = exact | 2**15
    bits = np.concatenate([bits, ties, exact])
    return bits[~np.isnan(bits.view(np.float32))]


def test_a_packed_weight_is_the_weight_to_the_last_bit():
    """The first half is the nearest bfloat16, as a cast has it except for ties."""
    bits = weights_of_all_kinds()
    weights = bits.view(np.float32)
    near, rest = jax.jit(pack_bf16)(weights)
    assert (near.dtype, rest.dtype) == (jnp.bfloat16, jnp.int16)
    np.testing.assert_array_equal(np.asarray(jax.jit(unpack_f32)(near, rest)).view(np.int32), bits)
    ties = bits & (2**16 - 1) == 2**15
    cast = weights[~ties].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(near[~ties].astype(np.float32), cast)
    finite = np.isfinite(weights)
    error = np.abs(near[finite] - weights[finite])
    assert (error <= np.abs(weights[finite]) * 2**-8 + 1e-38).all()


def test_a_packed_nan_is_a_nan():
    # The first is CUDA's.
    bits = [0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFFC00000]
    nans = np.array(bits, np.uint32).view(np.float32)
    for half in (jax.jit(pack_bf16)(nans)[0], unpack_f32(*pack_bf16(nans))):
        assert np.isnan(np.asarray(half, np.float32)).all()


@pytest.mark.parametrize("changes", [{}, dict(dense_microbatch=8)])
def test_packed_weights_change_nothing(changes):
    """On a mesh, steps with packed weights are those that cast float32 weights."""
    plain = trained_in_bfloat16(("own_gradients",), changes)
    packed = trained_in_bfloat16(("own_gradients", "cast_once"), changes)
    # Where two bfloat16s are equally near, a cast takes the other one.
    np.testing.assert_allclose(plain["loss"], packed["loss"], rtol=1e-5)
    # A bias is the sum of few bfloat16 steps.
    assert_close(packed["params"], plain["params"], 1e-3)
    assert packed["bytes"] <= plain["bytes"]


def trained_in_bfloat16(levers: tuple[str, ...], changes: dict) -> dict:
    """Return losses and parameters of two steps in one program, and its bytes."""
    setup = setup_of(
        "alexnet", "hybrid", (2, 2), levers, dtype="bfloat16", steps_per_call=2, **changes
    )
    assert setup.functions.packed == ("cast_once" in levers)
    state, metrics = setup.train(setup.init(), 2)
    moved = program.report(setup.train_program(2), setup.place.mesh, 2)["totals"]["bytes"]
    return dict(loss=metrics["loss"], params=gather(state.params), bytes=moved)


@pytest.mark.parametrize(
    "changes", [{}, dict(dense_microbatch=4), dict(dense_microbatch=4, dense_updates="sum")]
)
def test_layers_read_the_bfloat16_half(monkeypatch, changes):
    seen = []

    def spy_on(name):
        method = getattr(StepFunctions, name)

        def spy(self, params, *args):
            seen.append(params)
            return method(self, params, *args)

        monkeypatch.setattr(StepFunctions, name, spy)

    spy_on("features")
    spy_on("loss")
    setup = setup_of("alexnet", "data", (1, 1), dtype="bfloat16", **changes)
    setup.functions.jit_train().lower(
        setup.functions.abstract_state, *setup.feeds[0].shapes(2, setup.config.batch_size)
    )
    dtypes = {leaf.dtype for params in seen for leaf in jax.tree.leaves(params)}
    assert dtypes == {jnp.dtype("bfloat16")}
