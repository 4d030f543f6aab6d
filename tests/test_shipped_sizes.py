"""AlexNet as it ships, 4096 wide: bytes of the schemes; a mesh changes no number."""

import jax
import pytest
from setups import assert_close, gather, indices_of, on_devices, setup_of, shipped_config

from cnn_spmd.training.dry_run import dry_run


def test_ordering_of_the_schemes():
    """Batch 1024: hybrid moves at most half of data's bytes at 4x2, elsewhere a third.

    Alternating moves no more than hybrid. These are bytes of the closed form; the compiled payload
    is compared with it. The CPU compiler's all-reduces count as the reduce-scatters that they are
    on GPUs.
    """
    ring = {("data", (8, 1)): ring_bytes("data", (8, 1))}
    for shape in ((4, 2), (2, 4), (1, 8)):
        for parallelism in ("hybrid", "hybrid_alternating"):
            ring[parallelism, shape] = ring_bytes(parallelism, shape)
    for shape, share in (((4, 2), 1 / 2), ((2, 4), 1 / 3), ((1, 8), 1 / 3)):
        assert ring["hybrid", shape] <= share * ring["data", (8, 1)]
        # All that alternating has on top is the gradient of the replicated output layer, 0.3 MB.
        assert ring["hybrid_alternating", shape] <= ring["hybrid", shape] + 0.3e6


def ring_bytes(parallelism: str, shape: tuple[int, int]) -> int:
    """Compile a scheme's step; return the ring bytes of its closed form."""
    config = shipped_config()
    axes = dict(data=shape[0], model=shape[1])
    config.update(dict(batch_size=1024, parallelism=parallelism, mesh=axes))
    config.data.name = "synthetic"
    report = dry_run(config, None)
    for row in report["communication"]:
        expected = pytest.approx(row["closed_form_bytes"], rel=0.02, abs=200_000)
        assert row["compiled_bytes"] == expected, row
    return report["closed_form_ring_bytes"]


def test_shipped_size_on_a_mesh():
    """In float32 on 4x2: the loss and every gradient against one device."""
    one, many = (
        setup_of("alexnet", parallelism, shape, dtype="float32", model=dict(width=4096))
        for parallelism, shape in (("data", (1, 1)), ("hybrid", (4, 2)))
    )
    first = one.init()
    moved = jax.device_put(first, many.place.of_state(many.functions.abstract_state))
    expected_loss, expected = gradients_of(one, first)
    loss, gradients = gradients_of(many, moved)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    # Rounding that turns a ReLU is 1e-5 of a bias.
    assert_close(gradients, expected, 1e-4)


def gradients_of(setup, state) -> tuple[float, dict]:
    """Return the loss of the first step, and its gradients."""
    gradients, metrics, _ = jax.jit(setup.functions.gradients)(
        state, on_devices(setup), indices_of(setup, 0)
    )
    return float(metrics["loss"]), gather(gradients)
