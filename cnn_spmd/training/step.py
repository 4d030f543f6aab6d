"""Compute the train step and the evaluation step, as pure functions of a state and images.

Nothing here names a mesh axis. `place(x, ...)` constrains an array by its logical axes
(sharding/placement.py), and XLA inserts the collectives. Our code asks for two kinds by itself:
halos of maps that are split by height (sharding/halo.py), and images of a sharded data set.

A step sees the examples `indices_B`, which data/order.py makes from seed, step and config; mesh and
processes do not change them. There are three ways to give them. Where the data set is resident,
`data` is all of it, on every device, and the step takes data[indices_B]. Where it is streamed,
`data` holds just the examples, and the indices are None (data/feed.py). Where it is sharded, each
device holds a part of it, and an Exchange says which images each one sends to each other
(data/sharded.py); it takes the indices' place.

With `dense_microbatch`, microbatch.train_step takes the place of train_step: the dense layers then
see one part of the batch after another.

Learning rates are an input of the program. So another rate, schedule or number of steps needs no
compilation.

A name ends in its dimensions: B global batch, S steps per chunk (the steps of one compiled call), H
height, W width, C channels or classes, V views of a test image, F features that reach the dense
layers. [] is a scalar.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnn_spmd.data import sharded
from cnn_spmd.data.augment import Preprocessing
from cnn_spmd.data.feed import DeviceData, labels_of
from cnn_spmd.errors import UserError
from cnn_spmd.sharding.placement import Placement, axes_of, is_dense
from cnn_spmd.training import microbatch
from cnn_spmd.training.metrics import METRICS, check_metric

# Weights with at least this many elements are carried in bfloat16, too (carry_bf16).
LARGE = 2**16


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    step: jax.Array  # int32 []: steps done
    seed: jax.Array  # uint32 []: an input of the program, so that a new seed needs no compilation
    params: nnx.State  # float32
    model_state: nnx.State  # other variables of the network, such as batch statistics
    optimizer: Any  # the state of the optax optimizer, such as a momentum per parameter


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The pure functions of one run, with the settings that they share."""

    make_model: Callable[[nnx.Rngs], nnx.Module]
    preprocessing: Preprocessing
    make_optimizer: Callable[[optax.Schedule], optax.GradientTransformation]  # of a learning rate
    place: Placement
    label_smoothing: float
    microbatch: microbatch.Settings | None  # None: the dense layers see the whole batch at once
    carry_bf16: bool  # bfloat16 weights are carried from step to step beside the float32 ones

    # ---- State.

    def init(self, seed: jax.Array) -> TrainState:
        """Return the state at step 0, a function of the seed [] alone."""
        return self._first_state(seed, self.make_model(nnx.Rngs(jax.random.key(seed))))

    def _first_state(self, seed: jax.Array, model: nnx.Module) -> TrainState:
        """Return the state at step 0 with the network's arrays."""
        _, params, model_state = nnx.split(model, nnx.Param, ...)
        if microbatch.updates_each(self.microbatch):
            optimizer_state = microbatch.init_optimizer(self, params)
        else:
            optimizer_state = self.make_optimizer(optax.constant_schedule(0.0)).init(params)
        return TrainState(jnp.zeros((), jnp.int32), seed, params, model_state, optimizer_state)

    @functools.cached_property
    def abstract_model(self) -> nnx.Module:
        """Return the network with shapes and dtypes in place of its arrays."""
        return nnx.eval_shape(lambda: self.make_model(nnx.Rngs(0)))

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """Return the network without its arrays."""
        return nnx.graphdef(self.abstract_model)

    def model(self, params: nnx.State, model_state: nnx.State) -> nnx.Module:
        """Return the network with these arrays.

        copy=True makes new variables, not new arrays: what `features` assigns stays in this copy.
        """
        return nnx.merge(self.graph, params, model_state, copy=True)

    # ---- The train step.

    def batch(
        self, state: TrainState, data: DeviceData, indices_B: sharded.Indices
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return images float32 [B, H, W, C], labels [B] and a dropout key.

        Crops, flips, colour noise and dropout masks are a function of (seed, step), whatever the
        mesh: JAX's random bits depend on an element's place in the whole array, not on the device.
        """
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        crop_key, dropout_key, colour_key = jax.random.split(key, 3)
        data, indices_B = sharded.exchanged(self.place, data, indices_B)
        images_BHWC = self.preprocessing.train_images(data.images, indices_B, crop_key, colour_key)
        axes = self.place.map_axes(images_BHWC.shape[1], None)
        images_BHWC = self.place(images_BHWC, *axes)
        labels_B = self.place(labels_of(data, indices_B), "output_batch")
        return images_BHWC, labels_B, dropout_key

    def features(
        self, params: nnx.State, model_state: nnx.State, images_BHWC: jax.Array
    ) -> tuple[jax.Array, nnx.State]:
        """Return the output of the convolutions for training images [B, F], and the model state.

        The network's `features` may assign to its model state (batch statistics); `classify` may
        not.
        """
        model = self.model(params, model_state)
        x_BF = model.features(images_BHWC, self.place, train=True)
        _, _, new_model_state = nnx.split(model, nnx.Param, ...)
        return x_BF, new_model_state

    @functools.cached_property
    def first_dense_rows(self) -> str | None:
        """Return the logical axis of what the first dense layer takes, such as fc1_in.

        None: the network has no layers of layers/dense.py.
        """
        params = nnx.to_flat_state(nnx.state(self.abstract_model, nnx.Param))
        kernels = [param for _, param in params if is_dense(param) and len(param.shape) > 1]
        # By name: fc1_in comes before fc2_in.
        return min((axes_of(kernel)[0] for kernel in kernels), default=None)

    def classify(
        self, model: nnx.Module, x_BF: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits [B, C] of what the convolutions return, [B, F]."""
        x_BF = self.place.batch_to_features(x_BF, self.first_dense_rows)
        return model.classify(x_BF, self.place, dropout_key)

    def loss(
        self,
        params: nnx.State,
        model_state: nnx.State,
        x_BF: jax.Array,
        labels_B: jax.Array,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, dict]:
        """Classify the features; return the loss [], and the loss and accuracy as metrics.

        The loss is the mean cross-entropy in nats, with smoothed labels. With a dropout key, both
        are those of the network under dropout.
        """
        model = self.model(params, model_state)
        logits_BC = self.classify(model, x_BF, dropout_key)
        # From bfloat16 to float32; float64, in which tests compute, stays.
        logits_BC = logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32))
        _refuse_changes(model, model_state)
        one_hot_BC = jax.nn.one_hot(labels_B, logits_BC.shape[-1])
        targets_BC = optax.smooth_labels(one_hot_BC, self.label_smoothing)
        targets_BC = self.place(targets_BC, "output_batch", "fc3_out")
        loss = optax.softmax_cross_entropy(logits_BC, targets_BC).mean()
        return loss, dict(loss=loss, accuracy=(logits_BC.argmax(-1) == labels_B).mean())

    def gradients(
        self,
        state: TrainState,
        data: DeviceData,
        indices_B: sharded.Indices,
        weights: nnx.State | None = None,
    ) -> tuple[nnx.State, dict, nnx.State]:
        """Return the gradient of the loss, the metrics of `loss`, and the new model state.

        weights: what the layers compute with, from the method `weights`; None: state.params.
        """
        images_BHWC, labels_B, dropout_key = self.batch(state, data, indices_B)

        def loss_of(params):
            x_BF, new_model_state = self.features(params, state.model_state, images_BHWC)
            # classify does not change the model state, and does not need the new one.
            loss, metrics = self.loss(params, state.model_state, x_BF, labels_B, dropout_key)
            return loss, (metrics, new_model_state)

        at = state.params if weights is None else weights
        # The loss is a mean over the global batch. So XLA inserts a sum of each gradient over the
        # devices that saw other examples and hold the same part of the weight; no line asks for it.
        # Where layers compute in bfloat16, it sums in bfloat16.
        grads, (metrics, new_model_state) = jax.grad(loss_of, has_aux=True)(at)
        return grads, metrics, new_model_state

    def update(
        self,
        optimizer: optax.GradientTransformation,
        grads: nnx.State,
        optimizer_state: Any,
        params: nnx.State,
    ) -> tuple[nnx.State, Any]:
        """Return parameters and optimizer state after one step of the optimizer.

        optimizer: clips the gradient, adds the weight decay, applies momentum and learning rate
        (training/optim.py). grads: float32, or bfloat16 where `weights` were.
        """
        with jax.named_scope("update"):
            grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
            return optax.apply_updates(params, updates), optimizer_state

    def train_step(
        self,
        state: TrainState,
        data: DeviceData,
        indices_B: sharded.Indices,
        rate: jax.Array,
        weights: nnx.State | None = None,
    ) -> tuple[TrainState, dict]:
        """Do one step on the examples `indices_B`; return the new state and the metrics of `loss`.

        rate: the learning rate of this step, []. weights: as in `gradients`.
        """
        grads, metrics, model_state = self.gradients(state, data, indices_B, weights)
        optimizer = self.make_optimizer(lambda _: rate)
        params, optimizer_state = self.update(optimizer, grads, state.optimizer, state.params)
        state = TrainState(state.step + 1, state.seed, params, model_state, optimizer_state)
        return state, metrics

    def train_chunk(
        self, state: TrainState, data: DeviceData, indices_SB: sharded.Indices, rates_S: jax.Array
    ) -> tuple[TrainState, dict]:
        """Do the S steps of a chunk in one program; return the new state, and metrics [S].

        The host launches one program for S steps: that hides the time that a launch takes. Where
        indices_SB is None, `data` holds the examples of the chunk, [S, B, ...]. rates_S: learning
        rates.
        """
        streamed = indices_SB is None

        def body(carry, inputs):
            state, large = carry
            weights = self.weights(large, state.params)
            examples, rate = inputs
            batch = (examples, None) if streamed else (data, examples)
            if self.microbatch:
                state, metrics = microbatch.train_step(self, state, *batch, rate, weights)
            else:
                state, metrics = self.train_step(state, *batch, rate, weights)
            return (state, self.cast(state.params)), metrics

        inputs = (data if streamed else indices_SB), rates_S
        carry = state, self.cast(state.params)
        if len(rates_S) == 1:  # without a scan, as XLA's CPU backend runs its body slowly
            (state, _), metrics = body(carry, jax.tree.map(lambda x: x[0], inputs))
            return state, jax.tree.map(lambda x: x[None], metrics)
        (state, _), metrics = jax.lax.scan(body, carry, inputs)
        return state, metrics

    def cast(self, params: nnx.State) -> nnx.State | None:
        """Return params with the large arrays in bfloat16, and None in place of the small ones.

        None without carry_bf16: layers then read params. The update writes both forms of a large
        array at once. A small one would gain nothing, and carried twice it would cost a copy.
        """
        if not self.carry_bf16:
            return None
        return jax.tree.map(lambda w: w.astype(jnp.bfloat16) if w.size >= LARGE else None, params)

    def weights(self, large: nnx.State | None, params: nnx.State) -> nnx.State | None:
        """Return what layers compute with: `large` (of `cast`), and from params what it lacks."""
        if large is None:
            return None
        return jax.tree.map(
            lambda kernel, w: w if kernel is None else kernel,
            large,
            params,
            is_leaf=lambda x: x is None,
        )

    # ---- The evaluation step.

    def scores(self, state: TrainState, images_BHWC: jax.Array) -> jax.Array:
        """Return the log probability of each class for test images, float32 [B, C].

        The softmax outputs of several views of an image are averaged, as in cuda-convnet and in
        AlexNet (Krizhevsky et al. 2012, section 4.1).
        """
        views_BVHWC = self.preprocessing.test_views(images_BHWC)
        batch, views = views_BVHWC.shape[:2]
        # The views of an image are neighbours, and so they stay on one device.
        images = views_BVHWC.reshape(-1, *views_BVHWC.shape[2:])
        images = self.place(images, *self.place.map_axes(images.shape[1], None))
        model = self.model(state.params, state.model_state)
        logits = self.classify(model, model.features(images, self.place))
        logits_BVC = logits.astype(jnp.float32).reshape(batch, views, -1)
        logits_BVC = self.place(logits_BVC, "output_batch", None, "fc3_out")
        # The logarithm of the mean probability over the views.
        return jax.nn.logsumexp(jax.nn.log_softmax(logits_BVC), axis=1, b=1 / views)

    def eval_step(
        self,
        state: TrainState,
        data: DeviceData,
        indices_B: sharded.Indices,
        mask_B: jax.Array,
    ) -> dict:
        """Sum each of METRICS over the examples with a True mask, and count them as `examples`."""
        data, indices_B = sharded.exchanged(self.place, data, indices_B)
        images = data.images if indices_B is None else data.images[indices_B]
        scores_BC = self.scores(state, images)
        labels_B = self.place(labels_of(data, indices_B), "output_batch")
        mask_B = self.place(mask_B, "output_batch")
        sums = {"examples": mask_B.sum()}
        for name, metric in METRICS.items():
            values_B = metric(scores_BC, labels_B)
            check_metric(name, values_B, len(labels_B))
            sums[name] = jnp.where(mask_B, values_B, 0).sum()
        return sums

    # ---- Jitted, with the shardings of what they return.

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state.

        Raises UserError where an array does not divide as the table asks.
        """
        seed = np.uint32(0)  # any: only shapes count
        state = jax.eval_shape(self._first_state, seed, self.abstract_model)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            self.place.of_state(state),
        )

    def jit_init(self) -> Callable[[jax.Array], TrainState]:
        """Jit `init`. The state is created sharded: no device ever holds a split array whole."""
        return jax.jit(self.init, out_shardings=self.place.of_state(self.abstract_state))

    def jit_train(self) -> Callable:
        """Jit `train_chunk`. The state is donated: the new state takes the old one's memory.

        Arguments keep the shardings that they come with.
        """
        return jax.jit(
            self.train_chunk,
            donate_argnames="state",
            out_shardings=(self.place.of_state(self.abstract_state), self.place.replicated),
        )

    def jit_eval(self) -> Callable:
        """Jit `eval_step`; every device gets the sums."""
        return jax.jit(self.eval_step, out_shardings=self.place.replicated)


def _refuse_changes(model: nnx.Module, model_state: nnx.State) -> None:
    """Raise UserError where a network's `classify` has assigned to its model state."""
    _, _, after = nnx.split(model, nnx.Param, ...)
    before = nnx.to_flat_state(model_state)
    for (path, old), (_, new) in zip(before, nnx.to_flat_state(after), strict=True):
        if old[...] is not new[...]:
            name = ".".join(map(str, path))
            raise UserError(
                f"{name}: is changed by the network's classify, expected features to change it: "
                "classify may run once per micro-batch"
            )
