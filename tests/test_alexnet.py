"""AlexNet's layers, one by one, and its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from setups import (
    narrow,  # noqa: F401  (a fixture)
    network,
    on_one,
)

from cnn_spmd.layers import dense


def test_forward_against_lax():
    setup, _ = on_one("alexnet")
    model = network(setup, setup.init())
    x = h = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    for i, pooled in enumerate((True, True, False, False, True), 1):
        layer = getattr(model, f"conv{i}")
        h = jax.lax.conv_general_dilated(
            h, layer.kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jnp.maximum(h + layer.bias[...], 0)
        h = nnx.max_pool(h, (2, 2), (2, 2)) if pooled else h
    h = h.reshape(2, -1)
    for layer in (model.fc1, model.fc2):
        h = jnp.maximum(h @ layer.kernel[...] + layer.bias[...], 0)
    logits = h @ model.fc3.kernel[...] + model.fc3.bias[...]
    got = model.classify(model.features(x))
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-5)
    assert float(model.fc3.kernel[...].std()) == pytest.approx(0.01, rel=0.1)


def test_each_dense_layer_has_a_dropout_mask_of_its_own(monkeypatch):
    setup, _ = on_one("alexnet")
    calls = []

    def spy(x_BF, rate, key):
        calls.append((rate, key))
        return x_BF

    monkeypatch.setattr(dense, "dropout", spy)
    model = network(setup, setup.init())
    x_BF = jnp.zeros((2, 16 * 4 * 4))
    model.classify(x_BF, dropout_key=jax.random.key(0))
    assert [rate for rate, _ in calls] == [setup.config.model.dropout] * 2 != [0, 0]
    assert not np.array_equal(*(jax.random.key_data(key) for _, key in calls))
    model.classify(x_BF)
    assert [key for _, key in calls[2:]] == [None, None]
