"""The variable batch: dense layers that see the batch in micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from setups import (
    BATCH,
    BY_HAND,
    CONV,
    FC1,
    FC2,
    FC3,
    assert_close,
    gather,
    indices_of,
    narrow,  # noqa: F401  (a fixture)
    on_devices,
    on_one,
    setup_of,
    trained,
)

from cnn_spmd.training import microbatch, program_report
from cnn_spmd.training.step import StepFunctions


def test_micro_batches_on_meshes():
    """Summed gradients are plain SGD; updates after each are the same on every mesh.

    So are those of weights that are split at rest.
    """

    def run(shape, parallelism="hybrid", **changes):
        changes = dict(changes, model=dict(width=64, dropout=0.0))
        return trained(setup_of("shallow", parallelism, shape, **changes), 2)

    with jax.enable_x64(True):
        plain = run((1, 1))
        summed = run((2, 2), dense_microbatch=4, dense_updates="sum")
        each_on_one = run((1, 1), dense_microbatch=4)
        each = run((2, 2), "dense_2d", dense_microbatch=4)
        at_rest = run((2, 2), "fsdp", dense_microbatch=4)
        one_sum = run((1, 4), "mine", dense_microbatch=4)
    pairs = ((summed, plain), *((got, each_on_one) for got in (each, at_rest, one_sum)))
    for got, expected in pairs:
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
        assert_close(got[1], expected[1])
    assert abs(each[0][1] - plain[0][1]) > 1e-4


@pytest.mark.parametrize(
    ("parallelism", "n", "dense_gradients"),
    [
        ("hybrid", 3, {("reduce", "data"): BY_HAND["hybrid"]["reduce", "data"]}),
        ("spatial", 1, {("reduce", "data+model"): FC1 + FC2 + FC3}),
    ],
)
def test_what_two_micro_batches_move(parallelism, n, dense_gradients):
    """The activations of one batch; the dense gradients per micro-batch.

    By hand, in the compiled program and in the closed form.
    """
    setup = setup_of("alexnet", parallelism, (4, 2), dense_microbatch=8, dtype="float32")
    report = program_report.report_of(setup, setup.train_program(n), n)
    moved = {
        (row["kind"], "+".join(row["axes"])): (row["compiled_bytes"], row["closed_form_bytes"])
        for row in report["communication"]
    }
    expected = dict(BY_HAND[parallelism])
    for move, numbers in dense_gradients.items():
        expected[move] += numbers
    assert expected.keys() <= moved.keys()
    for move, (compiled, theory) in moved.items():
        assert compiled / 4 == pytest.approx(expected.get(move, 0), rel=0.01, abs=100), move
        assert theory / 4 == pytest.approx(expected.get(move, 0), rel=0.01, abs=100), move


def test_what_micro_batches_move_of_weights_at_rest():
    """Each micro-batch gathers dense weights and splits gradients, though one update follows."""
    changes = dict(dense_microbatch=8, dense_updates="sum", dtype="float32")
    setup = setup_of("alexnet", "fsdp", (4, 2), **changes)
    report = program_report.report_of(setup, setup.train_program(1), 1)
    dense, conv = FC1 + FC2 + FC3 - 144, CONV - 80  # without biases
    expected = dict(gather=2 * (2 * dense + conv) - 27 * 8, reduce=2 * dense + conv)
    for row in report["communication"]:
        by_hand = pytest.approx(expected[row["kind"]], rel=0.01)
        assert (row["compiled_bytes"] / 4, row["closed_form_bytes"] / 4) == (by_hand, by_hand), row


class PlainLoop:
    """A step with updates after each micro-batch, written out in SGD's own formula."""

    def __init__(self, setup):
        self.setup, self.settings = setup, setup.config.optimizer
        self.state = setup.init()
        self.params = jax.tree.map(jnp.asarray, self.state.params)
        self.momenta = jax.tree.map(jnp.zeros_like, self.params)
        self.gradient = jax.jit(jax.grad(self.loss))

    def loss(self, params, images, labels):
        functions = self.setup.functions
        x_BF, model_state = functions.features(params, self.state.model_state, images)
        return functions.loss(params, model_state, x_BF, labels, None)[0]

    def update(self, grads, rate, layers):
        """Do SGD's step on the layers with names that start with `layers`."""
        decay, momentum = self.settings.weight_decay, self.settings.momentum
        for (layer, name), _ in nnx.to_flat_state(self.params):
            if not layer.startswith(layers):
                continue
            weight = self.params[layer][name][...]
            grad = grads[layer][name][...] + (decay * weight if weight.ndim > 1 else 0)
            velocity = momentum * self.momenta[layer][name][...] + grad
            self.momenta[layer][name][...] = velocity
            self.params[layer][name][...] = weight - rate * (grad + momentum * velocity)

    def step(self, count):
        """Update dense layers after each of `count` micro-batches, then convolutions.

        Each device gives every micro-batch its share: examples part, part + count, ...
        """
        batch = jax.jit(self.setup.functions.batch)
        images, labels, _ = batch(self.state, on_devices(self.setup), indices_of(self.setup, 0))
        gradients = []
        for part in range(count):
            grads = self.gradient(self.params, images[part::count], labels[part::count])
            gradients.append(grads)
            self.update(grads, self.settings.learning_rate / count, "fc")
        mean = jax.tree.map(lambda *grads: sum(grads) / count, *gradients)
        self.update(mean, self.settings.learning_rate, "conv")


def test_micro_batches_against_a_plain_loop():
    """Four dense updates at a quarter of the rate, then one of the convolutions."""
    with jax.enable_x64(True):
        setup = setup_of(
            "shallow",
            "data",
            (1, 1),
            dense_microbatch=4,
            model=dict(width=64, dropout=0.0),
            optimizer=dict(clip_norm=0.0),
        )
        expected = PlainLoop(setup)
        expected.step(4)
        _, params = trained(setup, 1)
    assert_close(params, gather(expected.params))


def test_each_micro_batch_has_its_own_dropout(monkeypatch):
    """A micro-batch's loss gets a key that no other gets."""
    setup, data = on_one("shallow", dense_microbatch=4)
    loss, keys = StepFunctions.loss, []

    def spy(*args):
        jax.debug.callback(
            lambda key: keys.append(tuple(key.tolist())), jax.random.key_data(args[-1])
        )
        return loss(*args)

    monkeypatch.setattr(StepFunctions, "loss", spy)

    @jax.jit
    def step(state):
        return microbatch.train_step(setup.functions, state, data, jnp.arange(BATCH), 0.02)

    step(setup.init())
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 4


def test_the_accuracy_is_that_of_all_micro_batches():
    setup, data = on_one(
        "shallow",
        dense_microbatch=4,
        model=dict(width=64, dropout=0.0),
    )
    functions, indices = setup.functions, jnp.arange(BATCH)

    @jax.jit
    def metrics(state):
        _, whole, _ = functions.gradients(state, data, indices)
        _, micro = microbatch.train_step(functions, state, data, indices, 0.0)
        return whole["accuracy"], micro["accuracy"]

    whole, micro = metrics(setup.init())
    assert float(micro) == pytest.approx(float(whole))
    assert float(whole) > 0
