"""Train with the variable batch: dense layers see the batch in micro-batches.

Krizhevsky 2014 ("One weird trick"), section 4: the convolutions work on the whole batch, the dense
layers on `dense_microbatch` examples at a time. With dense_updates="each" the dense weights are
updated after each micro-batch, at 1/n of the learning rate for n micro-batches, which is no longer
exact SGD. Each of these updates clips its own gradient (clip_norm), and so does that of the
convolutions. With "sum" they are updated once per step, with the mean of the micro-batches'
gradients. That is plain SGD, except that each micro-batch has a dropout mask of its own.

Each device gives every micro-batch its share of examples, so that a micro-batch is gathered from
all devices: this is the paper's scheme (c), whose communication is spread evenly. In scheme (b) a
micro-batch is one device's own examples, and all other links idle; scheme (a) is the whole batch at
once. Up to UNROLLED micro-batches are written out in the program instead of looped over. XLA can
then gather the inputs of one while it computes another.

Shapes: B global batch, n micro-batches, F features that reach the dense layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cnn_spmd.data.feed import DeviceData
from cnn_spmd.data.sharded import Indices
from cnn_spmd.errors import UserError
from cnn_spmd.sharding.placement import UNPLACED, is_dense, named_variables

UNROLLED = 8  # as many as one weird trick had GPUs


class Settings(NamedTuple):
    """How the dense layers see the batch."""

    size: int  # examples per micro-batch
    updates: str  # of the dense layers: "each" micro-batch, or once per step for the "sum"


def updates_each(settings: Settings | None) -> bool:
    """Return whether the dense layers are updated after each micro-batch."""
    return settings is not None and settings.updates == "each"


def _dense_and_conv(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Split parameters or gradients into those of dense layers and the others."""
    return nnx.split_state(params, lambda path, variable: is_dense(variable), ...)


def init_optimizer(functions: Any, params: nnx.State) -> dict:
    """Return the state of two optimizers: of the convolutions and of the dense layers."""
    dense, conv = _dense_and_conv(params)
    optimizer = functions.make_optimizer(optax.constant_schedule(0.0))
    return dict(conv=optimizer.init(conv), dense=optimizer.init(dense))


def train_step(
    functions: Any,
    state: Any,
    data: DeviceData,
    indices_B: Indices,
    rate: jax.Array,
    weights: nnx.State | None = None,
) -> tuple[Any, dict]:
    """Do one step on the examples `indices_B`; return the new state and metrics [].

    functions: StepFunctions. rate: the learning rate of this step, []. weights: what the layers
    compute with at first, where that is not state.params (`StepFunctions.weights`).
    """
    images, labels_B, dropout_key = functions.batch(state, data, indices_B)
    at = state.params if weights is None else weights
    x_BF, backward, model_state = jax.vjp(
        lambda params: functions.features(params, state.model_state, images), at, has_aux=True
    )
    _refuse_unmarked(functions, state.params, state.model_state, x_BF)
    dense = DenseLayers(functions, state, len(labels_B) // functions.microbatch.size, rate, weights)
    dense_params, dense_optimizer, total, metrics, x_gradient = dense.train(
        x_BF, labels_B, dropout_key
    )
    _, conv_grads = _dense_and_conv(backward(x_gradient)[0])
    optimizer = functions.make_optimizer(lambda _: rate)
    if total is None:
        conv_params, conv_optimizer = functions.update(
            optimizer, conv_grads, state.optimizer["conv"], dense.conv_params
        )
        params = nnx.merge_state(dense_params, conv_params)
        optimizer_state = dict(conv=conv_optimizer, dense=dense_optimizer)
    else:
        mean = jax.tree.map(lambda grad: grad / dense.count, total)
        params, optimizer_state = functions.update(
            optimizer, nnx.merge_state(mean, conv_grads), state.optimizer, state.params
        )
    state = state._replace(
        step=state.step + 1, params=params, model_state=model_state, optimizer=optimizer_state
    )
    return state, jax.tree.map(jnp.mean, metrics)


def _refuse_unmarked(
    functions: Any, params: nnx.State, model_state: nnx.State, x_BF: jax.Array
) -> None:
    """Raise UserError where classify uses parameters that are not marked as dense.

    Their gradients would be lost: the step takes those of marked parameters from classify, and all
    others from features.
    """

    def classify(params):
        return functions.model(params, model_state).classify(x_BF, UNPLACED)

    jaxpr = jax.make_jaxpr(classify)(params).jaxpr
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    for (name, variable), argument in zip(named_variables(params), jaxpr.invars, strict=True):
        if id(argument) in used and not is_dense(variable):
            raise UserError(
                f"dense_microbatch={functions.microbatch.size}: {name} is used by the network's "
                "classify and is not marked as dense: make it with layers.dense.dense"
            )


class DenseLayers:
    """The dense layers in one step: forward, backward, update of each micro-batch."""

    def __init__(
        self, functions: Any, state: Any, count: int, rate: jax.Array, weights: nnx.State | None
    ):
        self.functions, self.state, self.count = functions, state, count
        self.optimizer = functions.make_optimizer(lambda _: rate / count)
        self.dense_params, self.conv_params = _dense_and_conv(state.params)
        self.dense_weights = None if weights is None else _dense_and_conv(weights)[0]

    def train(self, x_BF: jax.Array, labels_B: jax.Array, dropout_key: jax.Array) -> tuple:
        """Do all micro-batches; return a tuple.

        It has the dense parameters, the optimizer's state, the sum of the gradients, the metrics
        [n] and the gradient of x. With dense_updates="each" the sum is None. With "sum" the
        parameters are unchanged, and None stands for the optimizer's state.
        """
        place, each = self.functions.place, updates_each(self.functions.microbatch)
        inputs = (
            place.micro_batches(x_BF, self.count, place.features_batch, None),
            place.micro_batches(labels_B, self.count, "output_batch"),
            jax.random.split(dropout_key, self.count),
        )
        if each:
            carry = self.dense_weights, self.dense_params, self.state.optimizer["dense"], None
        else:
            zeros = jax.tree.map(jnp.zeros_like, self.dense_params)
            carry = self.dense_weights, self.dense_params, None, zeros
        (_, *carry), (metrics, gradients) = jax.lax.scan(
            self._micro_batch, carry, inputs, unroll=min(self.count, UNROLLED)
        )
        gradient = place.whole_batch(gradients / self.count, place.features_batch, None)
        return *carry, metrics, gradient.astype(x_BF.dtype)

    def _micro_batch(self, carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        """Do one micro-batch: the body of the scan."""
        weights, params, optimizer_state, total = carry
        gradients_of = jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True)
        at = params if weights is None else weights
        (_, metrics), (grads, x_gradient) = gradients_of(at, *inputs)
        if total is None:
            params, optimizer_state = self.functions.update(
                self.optimizer, grads, optimizer_state, params
            )
            weights = self.functions.weights(self.functions.cast(params), params)
        else:
            total = jax.tree.map(jnp.add, total, grads)
        return (weights, params, optimizer_state, total), (metrics, x_gradient)

    def _loss(self, dense: nnx.State, *inputs: jax.Array) -> tuple[jax.Array, dict]:
        params = nnx.merge_state(dense, self.conv_params)
        return self.functions.loss(params, self.state.model_state, *inputs)
