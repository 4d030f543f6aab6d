"""Model state: batch norm's statistics, on meshes and compared with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from setups import (
    NETWORKS,
    gather,
    indices_of,
    network,
    on_devices,
    setup_of,
)

from cnn_spmd.layers import dense


class Norm(nnx.Module):
    """Batch norm with running statistics in float32, whatever it computes in."""

    def __init__(self, channels):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32))

    def __call__(self, x_NHWC, train):
        mean_C, variance_C = self.mean[...], self.variance[...]
        if train:
            mean_C, variance_C = x_NHWC.mean((0, 1, 2)), x_NHWC.var((0, 1, 2))
            for old, new in ((self.mean, mean_C), (self.variance, variance_C)):
                old[...] = (0.9 * old[...] + 0.1 * new).astype(jnp.float32)
        return (x_NHWC - mean_C) * jax.lax.rsqrt(variance_C + 1e-5) * self.scale[...]


class Residual(nnx.Module):
    """A residual block with batch norm; no biases, arrays without logical axes."""

    def __init__(self, *, image_size, classes, width, dropout, dtype, rngs, levers):
        settings = dict(dtype=dtype, use_bias=False, padding="SAME", rngs=rngs)
        self.conv1 = nnx.Conv(3, 8, (3, 3), **settings)
        self.norm1 = Norm(8)
        self.conv2 = nnx.Conv(8, 8, (3, 3), **settings)
        self.norm2 = Norm(8)
        self.fc3 = dense.dense("fc3", 8, classes, dtype=dtype, rngs=rngs)

    def features(self, x_NHWC, place, train=False):
        x_NHWC = self.conv1(place(x_NHWC, "conv_batch", None, None, None, name="conv1 input"))
        x_NHWC = nnx.relu(self.norm1(x_NHWC, train))
        x_NHWC += nnx.relu(self.norm2(self.conv2(x_NHWC), train))
        return place(x_NHWC, "conv_batch", None, None, None).mean((1, 2))

    def classify(self, x_BF, place, dropout_key=None):
        return dense.logits(self.fc3, x_BF, place)


@pytest.fixture(autouse=True)
def residual(monkeypatch):
    """Know the network "residual"."""
    monkeypatch.setitem(NETWORKS, "residual", Residual)


@pytest.mark.parametrize("changes", [{}, dict(dense_microbatch=8)])
def test_batch_statistics_are_those_of_the_whole_batch(changes):
    """Model state is trained, used in evaluation and reported, alike on every mesh."""
    with jax.enable_x64(True):
        one, *meshes = (
            results_of(setup_of("residual", parallelism, shape, **changes))
            for parallelism, shape in (("data", (1, 1)), ("data", (4, 2)), ("hybrid", (2, 2)))
        )
    (mean,) = (value for name, value in one.items() if "norm1']['mean" in name)
    assert np.abs(mean).max() > 1e-3
    for many in meshes:
        for name, value in one.items():
            np.testing.assert_allclose(many[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def results_of(setup) -> dict[str, np.ndarray]:
    """Return state, losses and test scores after three steps; check the report."""
    state, metrics = setup.train(setup.init(), 3)
    images = setup.data.test_images
    scores_of = jax.jit(setup.functions.scores)
    scores = scores_of(state, images)
    fresh = state._replace(model_state=setup.init().model_state)
    # Evaluation uses the statistics.
    assert np.abs(scores - scores_of(fresh, images)).max() > 1e-3
    report = setup.report()
    assert "error" not in report
    # On one device nothing moves, whatever the network.
    assert report["closed_form"] == ([] if setup.place.mesh.size == 1 else None)
    assert {row["name"] for row in report["placement"]} >= {"norm1.mean", "fc3.kernel"}
    return gather((state, metrics["loss"], scores))


def test_batch_statistics_against_numpy():
    """One step moves the running mean a tenth of the way to the batch's mean."""
    with jax.enable_x64(True):
        setup = setup_of("residual", "data", (4, 2))
        state = setup.init()
        batch = jax.jit(setup.functions.batch)
        images, _, _ = batch(state, on_devices(setup), indices_of(setup, 0))
        mean_C = np.asarray(network(setup, state).conv1(images)).mean((0, 1, 2))
        state, _ = setup.train(state, 1)
    running_C = state.model_state["norm1"]["mean"][...]
    np.testing.assert_allclose(running_C, 0.1 * mean_C, rtol=1e-5)
