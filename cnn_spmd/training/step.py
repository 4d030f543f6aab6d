"""The pure train and evaluation steps, jitted with shardings and donation.

Nothing here names a mesh axis: arrays are placed by logical axes (sharding/placement.py) and XLA inserts the collectives.
Shapes: N examples of the data set, B global batch, S steps a call, H height, W width, C channels or classes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnn_spmd.data import augment as batches
from cnn_spmd.data.feed import DeviceData, labels_of
from cnn_spmd.sharding.placement import Placement
from cnn_spmd.training.packing import f32_weights, layer_weights, pack_bf16

UNROLLED = 8  # parts of a variable batch that are written out, not looped over: as many as one weird trick had GPUs


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    step: jax.Array  # int32 []: steps done
    seed: jax.Array  # uint32 []; here, and not a constant of the program, so that another seed compiles nothing again
    params: (
        nnx.State
    )  # float32; within a call, where Steps.halves, each a pair of pack_bf16's halves
    optimizer: Any  # optax state; a momentum a parameter


def is_dense(path: tuple, _) -> bool:
    """Whether a parameter belongs to the dense layers."""
    return path[0].startswith("fc")


@dataclasses.dataclass(frozen=True)
class Steps:
    """The pure functions of one run: model, optimizer and placement, with the settings that they close over."""

    make_model: Any  # (nnx.Rngs) -> nnx.Module
    optimizer: optax.GradientTransformation
    place: Placement
    dense_optimizer: optax.GradientTransformation | None  # for dense_updates="each"
    dense_microbatch: int  # 0: the whole batch at once
    mean: Any  # [C] or [H, W, C], of the training set, in pixels
    std: Any  # [C] or []
    seed: int
    label_smoothing: float
    crop: int  # side of what the network sees of an image; 0: all of it
    crop_pad: int
    colour_CC: Any  # colour noise along these axes, in pixels; None: none
    flip: bool  # mirror training images at random
    views: str  # of a test image: "one", "mirrored" or "ten"
    mirror: bool  # whether a mirrored test image keeps its class
    halves: (
        bool  # "cast_once": the steps of a call hand on the weights as two halves, see pack_bf16
    )

    def init(self, seed: jax.Array) -> TrainState:
        """The state at step 0, a function of the seed [] alone."""
        params = nnx.state(self.make_model(nnx.Rngs(jax.random.key(seed))), nnx.Param)
        if self.dense_optimizer is None:
            optimizer = self.optimizer.init(params)
        else:
            dense, conv = nnx.split_state(params, is_dense, ...)
            optimizer = dict(conv=self.optimizer.init(conv), dense=self.dense_optimizer.init(dense))
        return TrainState(jnp.zeros((), jnp.int32), seed, params, optimizer)

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """The model without its arrays."""
        return nnx.split(nnx.eval_shape(lambda: self.make_model(nnx.Rngs(0))))[0]

    def batch(
        self, data: DeviceData, state: TrainState, indices_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images [B, H, W, C], labels [B] and a dropout key.

        Crops, flips, colour noise and dropout masks are a function of (seed, step), the same on every mesh.
        """
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        crop_key, dropout_key = jax.random.split(key)
        images = batches.crop_and_flip(
            data.images, indices_B, crop_key, side=self.crop, pad=self.crop_pad, flip=self.flip
        )
        if self.colour_CC is not None:
            images = (
                images
                + batches.colour_noise(jax.random.fold_in(key, 2), len(images), self.colour_CC)[
                    :, None, None
                ]
            )
        images = self.place(
            batches.normalise(images, self.mean, self.std), "conv_batch", None, None, None
        )
        return images, self.place(labels_of(data, indices_B), "output_batch"), dropout_key

    def features(self, params: nnx.State, images_NHWC: jax.Array) -> jax.Array:
        """What the convolutions make of the images; [B, F]."""
        return nnx.merge(self.graph, params).features(images_NHWC, self.place)

    def loss(
        self, params: nnx.State, x_BF: jax.Array, labels_B: jax.Array, dropout_key: jax.Array | None
    ):
        """From the features: the mean softmax cross-entropy (nats, labels smoothed), and it and the accuracy as metrics."""
        logits_BC = nnx.merge(self.graph, params).classify(x_BF, self.place, dropout_key)
        logits_BC = logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32))
        targets_BC = optax.smooth_labels(
            jax.nn.one_hot(labels_B, logits_BC.shape[-1]), self.label_smoothing
        )
        targets_BC = self.place(targets_BC, "output_batch", "fc3_out")
        loss = optax.softmax_cross_entropy(logits_BC, targets_BC).mean()
        return loss, dict(loss=loss, accuracy=(logits_BC.argmax(-1) == labels_B).mean())

    def gradients(
        self, data: DeviceData, state: TrainState, indices_B: jax.Array | None
    ) -> tuple[dict, nnx.State]:
        """loss and accuracy [] on the examples `indices_B`, and the loss's gradient by each parameter."""
        images, labels_B, key = self.batch(data, state, indices_B)
        grads, metrics = jax.grad(
            lambda params: self.loss(params, self.features(params, images), labels_B, key),
            has_aux=True,
        )(layer_weights(state.params))
        return metrics, grads

    def update(
        self,
        optimizer: optax.GradientTransformation,
        grads: nnx.State,
        state: Any,
        params: nnx.State,
    ) -> tuple[nnx.State, Any]:
        """Parameters, and the optimizer's state, after the optimizer's step along `grads`."""
        with jax.named_scope("update"):
            weights = f32_weights(params)
            grads = jax.tree.map(lambda grad, weight: grad.astype(weight.dtype), grads, weights)
            updates, state = optimizer.update(grads, state, weights)
            return self.packed(optax.apply_updates(weights, updates)), state

    def packed(self, weights: nnx.State) -> nnx.State:
        """The weights as a call's steps hand them on."""
        return jax.tree.map(pack_bf16, weights) if self.halves else weights

    def train_step(
        self, data: DeviceData, state: TrainState, indices_B: jax.Array | None
    ) -> tuple[TrainState, dict]:
        """One step on the examples `indices_B`; returns the new state, loss and accuracy."""
        if self.dense_microbatch:
            return self.variable_batch_step(data, state, indices_B)
        metrics, grads = self.gradients(data, state, indices_B)
        params, optimizer = self.update(self.optimizer, grads, state.optimizer, state.params)
        return TrainState(state.step + 1, state.seed, params, optimizer), metrics

    def variable_batch_step(
        self, data: DeviceData, state: TrainState, indices_B: jax.Array | None
    ) -> tuple[TrainState, dict]:
        """One step in which the dense layers see the batch in parts of `dense_microbatch` examples, one after another.

        dense_updates="each": the dense weights are updated after each part's backward pass, at 1/parts of the learning
        rate; the convolutions once, at the end (Krizhevsky 2014, section 4: no longer exact SGD). dense_updates="sum":
        the parts' gradients are averaged first, which is plain SGD, each part with a dropout mask of its own.

        Each device gives every part its share of examples, so that a part's activations are gathered from all: this is
        the paper's scheme (c), whose communication is spread evenly. Scheme (b), a worker's own 128 examples a part,
        would leave all but one worker's links idle; scheme (a) is the whole batch at once. The parts stand one after another
        in the program (up to UNROLLED of them, in a loop if there are more), so that one part's communication can run behind
        another's computation, as (b) and (c) are meant to. In XLA's schedule for 4 H100s (jaxlib 0.11.2) the next part's
        gathers run under the update that a part ends with, and the gradients of all parts' inputs are reduce-scattered
        together, under products and updates.
        """
        images, labels_B, key = self.batch(data, state, indices_B)
        x_BF, backward = jax.vjp(
            lambda params: self.features(params, images), layer_weights(state.params)
        )
        parts = len(labels_B) // self.dense_microbatch
        dense, conv = nnx.split_state(state.params, is_dense, ...)

        def in_parts(x, *axes):  # [B, ...] -> [parts, B / parts, ...]
            x = self.place(
                x.reshape(self.dense_microbatch, parts, *x.shape[1:]), axes[0], None, *axes[1:]
            )
            return x.swapaxes(0, 1)

        def loss_of_part(dense, *inputs):
            return self.loss(nnx.merge_state(dense, layer_weights(conv)), *inputs)

        def part(carry, inputs):
            dense, optimizer, total = carry
            gradients_of = jax.value_and_grad(loss_of_part, argnums=(0, 1), has_aux=True)
            (_, metrics), (grads, x_gradient) = gradients_of(layer_weights(dense), *inputs)
            if self.dense_optimizer is None:
                total = jax.tree.map(jnp.add, total, grads)
            else:
                dense, optimizer = self.update(self.dense_optimizer, grads, optimizer, dense)
            return (dense, optimizer, total), (metrics, x_gradient)

        each = self.dense_optimizer is not None
        inputs = (
            in_parts(x_BF, "conv_batch", None),
            in_parts(labels_B, "output_batch"),
            jax.random.split(key, parts),
        )
        zeros = jax.tree.map(jnp.zeros_like, f32_weights(dense))
        carry = (dense, state.optimizer["dense"], None) if each else (dense, None, zeros)
        (dense, optimizer, total), (metrics, gradient) = jax.lax.scan(
            part, carry, inputs, unroll=min(parts, UNROLLED)
        )

        gradient = self.place(
            gradient.swapaxes(0, 1).reshape(x_BF.shape) / parts, "conv_batch", None
        )
        _, conv_grads = nnx.split_state(backward(gradient.astype(x_BF.dtype))[0], is_dense, ...)
        if each:
            conv, conv_optimizer = self.update(
                self.optimizer, conv_grads, state.optimizer["conv"], conv
            )
            params, optimizer = (
                nnx.merge_state(dense, conv),
                dict(conv=conv_optimizer, dense=optimizer),
            )
        else:
            grads = nnx.merge_state(jax.tree.map(lambda g: g / parts, total), conv_grads)
            params, optimizer = self.update(self.optimizer, grads, state.optimizer, state.params)
        return TrainState(state.step + 1, state.seed, params, optimizer), jax.tree.map(
            jnp.mean, metrics
        )

    def train_steps(
        self, state: TrainState, data: DeviceData, indices_SB: jax.Array | None
    ) -> tuple[TrainState, dict]:
        """S steps in one program; metrics are [S]. One step stays outside a scan, which the CPU backend runs slowly.

        indices_SB: None where `data` are the examples themselves, [S, B, ...].
        """

        def step(state, inputs):
            data_of_step, indices_B = inputs if indices_SB is None else (data, inputs)
            return self.train_step(data_of_step, state, indices_B)

        inputs = (data, None) if indices_SB is None else indices_SB
        state = state._replace(params=self.packed(state.params))
        if len(jax.tree.leaves(inputs)[0]) == 1:
            state, metrics = step(state, jax.tree.map(lambda x: x[0], inputs))
            metrics = jax.tree.map(lambda x: x[None], metrics)
        else:
            state, metrics = jax.lax.scan(step, state, inputs)
        return state._replace(params=f32_weights(state.params)), metrics

    def scores(self, params: nnx.State, images_BHWC: jax.Array) -> jax.Array:
        """Log probabilities [B, C] of the classes of test images, float32.

        Of several views of an image the softmax outputs are averaged, as in cuda-convnet and in AlexNet 2012 (section 4.1).
        """
        views = batches.eval_views(images_BHWC, self.crop, self.views, self.mirror)
        images = batches.normalise(
            views.reshape(-1, *views.shape[2:]), self.mean, self.std
        )  # an image's views stay together
        images = self.place(images, "conv_batch", None, None, None)
        model = nnx.merge(self.graph, params)
        logits = model.classify(model.features(images, self.place), self.place).astype(jnp.float32)
        logits_BVC = self.place(
            logits.reshape(*views.shape[:2], -1), "output_batch", None, "fc3_out"
        )
        return jax.nn.logsumexp(
            jax.nn.log_softmax(logits_BVC), 1, b=1 / views.shape[1]
        )  # log of the mean probability

    def eval_step(
        self, params: nnx.State, data: DeviceData, indices_B: jax.Array | None, mask_B: jax.Array
    ) -> dict:
        """Sums over the examples with a True mask: loss (nats, no smoothing), correct, correct among the top five, examples."""
        scores_BC = self.scores(
            params, data.images if indices_B is None else data.images[indices_B]
        )
        labels_B, mask_B = (
            self.place(x, "output_batch") for x in (labels_of(data, indices_B), mask_B)
        )
        own_B1 = jnp.take_along_axis(scores_BC, labels_B[:, None], axis=-1)
        before_BC = jnp.arange(scores_BC.shape[-1]) < labels_B[:, None]
        # How many classes come before the label: of equal scores the first, and a NaN comes last.
        rank_B = (~(own_B1 >= scores_BC) | ((own_B1 == scores_BC) & before_BC)).sum(-1)
        return dict(
            loss=-jnp.where(mask_B, own_B1[:, 0], 0).sum(),
            correct=(mask_B & (rank_B == 0)).sum(),
            top5=(mask_B & (rank_B < 5)).sum(),
            examples=mask_B.sum(),
        )

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state. Raises UserError where the table cannot be met."""
        state = jax.eval_shape(self.init, np.uint32(self.seed))
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            self.place.of_state(state),
        )

    def activations(self, batch_size: int, image_size: int) -> list[tuple[str, tuple, tuple]]:
        """(name, logical axes, shape) of each layer's input and output, in the order of the network.

        Raises UserError where the table cannot be met.
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

    def jit_init(self):
        """() -> TrainState, created already sharded: no device ever holds the whole of a split array."""
        jitted = jax.jit(self.init, out_shardings=self.place.of_state(self.abstract_state))
        return functools.partial(jitted, np.uint32(self.seed))

    def jit_train(self):
        """train_steps, with the state donated: the new one takes the old one's memory."""
        return jax.jit(
            self.train_steps,
            donate_argnums=0,
            out_shardings=(self.place.of_state(self.abstract_state), self.place.replicated),
        )

    def jit_eval(self):
        """eval_step, its sums on every device."""
        return jax.jit(self.eval_step, out_shardings=self.place.replicated)
