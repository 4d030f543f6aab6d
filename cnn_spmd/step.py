"""The pure train and evaluation steps, jitted with shardings and donation.

Nothing here names a mesh axis: arrays are placed by logical axes (placement.py) and XLA inserts the collectives.
Shapes: N examples of the data set, B global batch, S steps a call, H height, W width, C channels or classes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cnn_spmd.data import batches
from cnn_spmd.placement import Placement


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    step: jax.Array  # int32 []: steps done
    params: nnx.State  # float32
    optimizer: Any  # optax state; a momentum a parameter


class DeviceData(NamedTuple):
    """A split of the data set, whole on every device."""

    images: jax.Array  # uint8 [N, H, W, 3]
    labels: jax.Array  # int32 [N]


@dataclasses.dataclass(frozen=True)
class Steps:
    """The pure functions of one run: model, optimizer and placement, with the settings that they close over."""

    make_model: Any  # (nnx.Rngs) -> nnx.Module
    optimizer: optax.GradientTransformation
    place: Placement
    mean_C: Any  # of the training set, in pixels
    std_C: Any
    seed: int
    label_smoothing: float
    crop_pad: int
    flip: bool  # mirror training images at random
    flip_average: bool  # evaluate on the image and its mirror

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        params = nnx.state(self.make_model(nnx.Rngs(self.seed)), nnx.Param)
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """The model without its arrays."""
        return nnx.split(nnx.eval_shape(lambda: self.make_model(nnx.Rngs(self.seed))))[0]

    def loss(self, params: nnx.State, images_NHWC: jax.Array, labels_B: jax.Array, key: jax.Array | None):
        """Mean softmax cross-entropy over the global batch (nats, labels smoothed), and the logits [B, C]."""
        model = nnx.merge(self.graph, params)
        logits_BC = model(images_NHWC, place=self.place, dropout_key=key).astype(jnp.float32)
        targets_BC = optax.smooth_labels(jax.nn.one_hot(labels_B, logits_BC.shape[-1]), self.label_smoothing)
        targets_BC = self.place(targets_BC, "output_batch", "fc3_out")
        return optax.softmax_cross_entropy(logits_BC, targets_BC).mean(), logits_BC

    def gradients(self, data: DeviceData, state: TrainState, indices_B: jax.Array) -> tuple[dict, nnx.State]:
        """loss and accuracy [] on the examples `indices_B`, and the loss's gradient by each parameter.

        Crops, flips and dropout masks are a function of (seed, step), the same on every mesh.
        """
        crop_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), state.step))
        images = batches.crop_and_flip(data.images, indices_B, crop_key, pad=self.crop_pad, flip=self.flip)
        images = self.place(batches.normalise(images, self.mean_C, self.std_C), "conv_batch", None, None, None)
        labels_B = self.place(data.labels[indices_B], "output_batch")
        (loss, logits_BC), grads = jax.value_and_grad(self.loss, has_aux=True)(state.params, images, labels_B, dropout_key)
        return dict(loss=loss, accuracy=(logits_BC.argmax(-1) == labels_B).mean()), grads

    def update(self, state: TrainState, grads: nnx.State) -> TrainState:
        """The state after the optimizer's step along `grads`."""
        with jax.named_scope("update"):
            updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
            return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer)

    def train_step(self, data: DeviceData, state: TrainState, indices_B: jax.Array) -> tuple[TrainState, dict]:
        """One SGD step on the examples `indices_B`; returns the new state, loss and accuracy."""
        metrics, grads = self.gradients(data, state, indices_B)
        return self.update(state, grads), metrics

    def train_steps(self, state: TrainState, data: DeviceData, indices_SB: jax.Array) -> tuple[TrainState, dict]:
        """S steps in one program; metrics are [S]. One step stays outside a scan, which the CPU backend runs slowly."""
        step = functools.partial(self.train_step, data)
        if len(indices_SB) > 1:
            return jax.lax.scan(step, state, indices_SB)
        state, metrics = step(state, indices_SB[0])
        return state, jax.tree.map(lambda x: x[None], metrics)

    def eval_step(self, params: nnx.State, data: DeviceData, indices_B: jax.Array, mask_B: jax.Array) -> dict:
        """Sums over the unmasked examples: loss (nats, no smoothing), correct, correct among the top five, examples."""
        images = batches.normalise(data.images[indices_B], self.mean_C, self.std_C)
        model = nnx.merge(self.graph, params)
        views = [images, images[:, :, ::-1]] if self.flip_average else [images]
        views = [self.place(view, "conv_batch", None, None, None) for view in views]
        logits_BC = sum(model(view, place=self.place).astype(jnp.float32) for view in views) / len(views)
        labels_B, mask_B = (self.place(x, "output_batch") for x in (data.labels[indices_B], mask_B))
        losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
        own_B1 = jnp.take_along_axis(logits_BC, labels_B[:, None], axis=-1)
        rank_B = (logits_BC > own_B1).sum(-1)  # how many classes score higher than the label
        return dict(loss=jnp.where(mask_B, losses_B, 0).sum(), correct=(mask_B & (rank_B == 0)).sum(),
                    top5=(mask_B & (rank_B < 5)).sum(), examples=mask_B.sum())

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state. Raises UserError where the table cannot be met."""
        state = jax.eval_shape(self.init)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
                            self.place.of_state(state))

    def jit_init(self):
        """() -> TrainState, created already sharded: no device ever holds the whole of a split array."""
        return jax.jit(self.init, out_shardings=self.place.of_state(self.abstract_state))

    def jit_train(self):
        """train_steps, with the state donated: the new one takes the old one's memory."""
        return jax.jit(self.train_steps, donate_argnums=0,
                       out_shardings=(self.place.of_state(self.abstract_state), self.place.replicated))

    def jit_eval(self):
        """eval_step, its sums on every device."""
        return jax.jit(self.eval_step, out_shardings=self.place.replicated)
