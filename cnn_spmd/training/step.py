"""The train step and the evaluation step: pure functions, jitted with shardings and donation.

Nothing here names a mesh axis. Arrays are placed by logical axes (sharding/placement.py), and XLA
inserts the collectives.

Shapes: N examples of the data set, B global batch, S steps per chunk, H height, W width, C channels
or classes, V views of a test image, F features that reach the dense layers.
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

from cnn_spmd.data.augment import Preprocessing
from cnn_spmd.data.feed import DeviceData, labels_of
from cnn_spmd.sharding.placement import Placement
from cnn_spmd.training import microbatch, packing
from cnn_spmd.training.metrics import METRICS


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    step: jax.Array  # int32 []: steps done
    seed: jax.Array  # uint32 []: an input of the program, so that another seed compiles nothing
    params: nnx.State  # float32
    model_state: nnx.State  # what a network declares beside parameters, such as batch statistics
    optimizer: Any  # optax state: a momentum per parameter


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The pure functions of one run, with the settings that they share."""

    make_model: Callable[[nnx.Rngs], nnx.Module]
    preprocessing: Preprocessing
    optimizer: optax.GradientTransformation
    place: Placement
    seed: int
    label_smoothing: float
    microbatch: microbatch.Settings | None  # None: the dense layers see the whole batch at once
    packed: bool  # the steps of a chunk hand on packed weights (packing.py)

    # ---- State.

    def init(self, seed: jax.Array) -> TrainState:
        """Return the state at step 0, a function of the seed [] alone."""
        model = self.make_model(nnx.Rngs(jax.random.key(seed)))
        _, params, model_state = nnx.split(model, nnx.Param, ...)
        if microbatch.updates_each(self.microbatch):
            optimizer = microbatch.init_optimizer(self, params)
        else:
            optimizer = self.optimizer.init(params)
        return TrainState(jnp.zeros((), jnp.int32), seed, params, model_state, optimizer)

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """Return the network without its arrays."""
        return nnx.split(nnx.eval_shape(lambda: self.make_model(nnx.Rngs(0))))[0]

    def model(self, params: nnx.State, model_state: nnx.State) -> nnx.Module:
        """Return the network with these arrays."""
        return nnx.merge(self.graph, params, model_state, copy=True)

    # ---- The train step.

    def batch(
        self, state: TrainState, data: DeviceData, indices_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return images float32 [B, H, W, C], labels [B] and a dropout key.

        Crops, flips, colour noise and dropout masks are a function of (seed, step), whatever the
        mesh. indices_B: None where `data` holds just the examples of the step.
        """
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        images = self.preprocessing.train_images(data.images, indices_B, key)
        images = self.place(images, "conv_batch", None, None, None)
        labels_B = self.place(labels_of(data, indices_B), "output_batch")
        return images, labels_B, jax.random.split(key)[1]

    def features(
        self, params: nnx.State, model_state: nnx.State, images_NHWC: jax.Array
    ) -> tuple[jax.Array, nnx.State]:
        """Return what the convolutions make of training images, [B, F], and the new model state."""
        model = self.model(params, model_state)
        x_BF = model.features(images_NHWC, self.place, train=True)
        return x_BF, nnx.split(model, nnx.Param, ...)[2]

    def loss(
        self,
        params: nnx.State,
        model_state: nnx.State,
        x_BF: jax.Array,
        labels_B: jax.Array,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, dict]:
        """Return the mean cross-entropy of the features (nats, labels smoothed), and metrics."""
        logits_BC = self.model(params, model_state).classify(x_BF, self.place, dropout_key)
        logits_BC = logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32))
        one_hot_BC = jax.nn.one_hot(labels_B, logits_BC.shape[-1])
        targets_BC = optax.smooth_labels(one_hot_BC, self.label_smoothing)
        targets_BC = self.place(targets_BC, "output_batch", "fc3_out")
        loss = optax.softmax_cross_entropy(logits_BC, targets_BC).mean()
        return loss, dict(loss=loss, accuracy=(logits_BC.argmax(-1) == labels_B).mean())

    def gradients(
        self,
        state: TrainState,
        data: DeviceData,
        indices_B: jax.Array | None,
        weights: nnx.State | None = None,
    ) -> tuple[nnx.State, dict, nnx.State]:
        """Return the loss's gradient by each parameter, loss and accuracy [], and the model state.

        weights: the parameters as the layers multiply with them; None: state.params.
        """
        images, labels_B, dropout_key = self.batch(state, data, indices_B)

        def loss_of(weights):
            x_BF, model_state = self.features(weights, state.model_state, images)
            loss, metrics = self.loss(weights, state.model_state, x_BF, labels_B, dropout_key)
            return loss, (metrics, model_state)

        weights = state.params if weights is None else weights
        grads, (metrics, model_state) = jax.grad(loss_of, has_aux=True)(weights)
        return grads, metrics, model_state

    def update(
        self,
        optimizer: optax.GradientTransformation,
        grads: nnx.State,
        optimizer_state: Any,
        params: nnx.State,
    ) -> tuple[nnx.State, Any]:
        """Return the parameters and the optimizer's state after its step along `grads`."""
        with jax.named_scope("update"):
            grads = jax.tree.map(lambda grad, weight: grad.astype(weight.dtype), grads, params)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
            return optax.apply_updates(params, updates), optimizer_state

    def train_step(
        self,
        state: TrainState,
        data: DeviceData,
        indices_B: jax.Array | None,
        weights: nnx.State | None = None,
    ) -> tuple[TrainState, dict]:
        """Do one step on the examples `indices_B`; return the new state, loss and accuracy [].

        XLA inserts the collectives from where `place` puts activations and parameters: the
        gradients of replicated weights are all-reduced here, before the update.
        """
        grads, metrics, model_state = self.gradients(state, data, indices_B, weights)
        params, optimizer = self.update(self.optimizer, grads, state.optimizer, state.params)
        return TrainState(state.step + 1, state.seed, params, model_state, optimizer), metrics

    def train_chunk(
        self, state: TrainState, data: DeviceData, indices_SB: jax.Array | None
    ) -> tuple[TrainState, dict]:
        """Do S steps in one program; return the new state, and metrics [S].

        indices_SB: None where `data` holds the examples of the chunk, [S, B, ...].
        A single step stays outside a scan, which XLA's CPU backend runs slowly.
        """
        step = self.train_step
        if self.microbatch:
            step = functools.partial(microbatch.train_step, self)
        elif self.packed:
            step = packing.packed_step(step)

        def body(state, inputs):
            return step(state, *((*inputs, None) if indices_SB is None else (data, inputs)))

        inputs = (data,) if indices_SB is None else indices_SB
        state = packing.pack(state) if self.packed else state
        if len(jax.tree.leaves(inputs)[0]) == 1:
            state, metrics = body(state, jax.tree.map(lambda x: x[0], inputs))
            metrics = jax.tree.map(lambda x: x[None], metrics)
        else:
            state, metrics = jax.lax.scan(body, state, inputs)
        return packing.unpack(state) if self.packed else state, metrics

    # ---- The evaluation step.

    def scores(self, state: TrainState, images_BHWC: jax.Array) -> jax.Array:
        """Return the log probability of each class for test images, float32 [B, C].

        The softmax outputs of several views of an image are averaged, as in cuda-convnet and in
        AlexNet (Krizhevsky et al. 2012, section 4.1).
        """
        views = self.preprocessing.test_views(images_BHWC)
        batch, count = views.shape[:2]
        images = views.reshape(-1, *views.shape[2:])  # the views of an image stay on one device
        images = self.place(images, "conv_batch", None, None, None)
        model = self.model(state.params, state.model_state)
        logits = model.classify(model.features(images, self.place), self.place)
        logits_BVC = logits.astype(jnp.float32).reshape(batch, count, -1)
        logits_BVC = self.place(logits_BVC, "output_batch", None, "fc3_out")
        return jax.nn.logsumexp(jax.nn.log_softmax(logits_BVC), 1, b=1 / count)

    def eval_step(
        self,
        state: TrainState,
        data: DeviceData,
        indices_B: jax.Array | None,
        mask_B: jax.Array,
    ) -> dict:
        """Sum each of METRICS over the examples with a True mask, and count them as `examples`."""
        images = data.images if indices_B is None else data.images[indices_B]
        scores_BC = self.scores(state, images)
        labels_B = self.place(labels_of(data, indices_B), "output_batch")
        mask_B = self.place(mask_B, "output_batch")
        sums = {"examples": mask_B.sum()}
        for name, metric in METRICS.items():
            sums[name] = jnp.where(mask_B, metric(scores_BC, labels_B), 0).sum()
        return sums

    # ---- The same with shardings.

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the state.

        Raises UserError where an array does not divide as the table asks.
        """
        state = jax.eval_shape(self.init, np.uint32(self.seed))
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            self.place.of_state(state),
        )

    def activations(self, batch_size: int, image_size: int) -> list[tuple[str, tuple, tuple]]:
        """Return (name, logical axes, shape) of each layer's input and output, in order.

        Raises UserError where one does not divide as the table asks.
        """
        seen = []
        place = dataclasses.replace(
            self.place, record=lambda name, axes, x: seen.append((name, axes, x.shape))
        )
        model = nnx.eval_shape(lambda: self.make_model(nnx.Rngs(0)))
        nnx.eval_shape(
            lambda model, x: model.classify(model.features(x, place), place),
            model,
            jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.float32),
        )
        return seen

    def jit_init(self) -> Callable[[], TrainState]:
        """Jit `init`. The state is created sharded: no device ever holds a split array whole."""
        jitted = jax.jit(self.init, out_shardings=self.place.of_state(self.abstract_state))
        return functools.partial(jitted, np.uint32(self.seed))

    def jit_train(self):
        """Jit `train_chunk`, with the state donated: the new state takes the old one's memory."""
        return jax.jit(
            self.train_chunk,
            donate_argnums=0,
            out_shardings=(self.place.of_state(self.abstract_state), self.place.replicated),
        )

    def jit_eval(self):
        """Jit `eval_step`; every device gets the sums."""
        return jax.jit(self.eval_step, out_shardings=self.place.replicated)
