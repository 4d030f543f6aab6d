"""Measure the simple noise scale, which predicts how large a batch is worth its cost.

McCandlish et al. 2018 (arXiv 1812.06162), section 2.2 and appendix A.1. Let G be the gradient of
the loss over all examples, and S the covariance of the gradients of single examples. The simple
noise scale is tr(S) / |G|^2, a number of examples. A batch much smaller than that is mostly noise:
twice the batch saves nearly half of the steps. A batch much larger is mostly signal: twice the
batch saves few steps.

At an evaluation, the gradients of n batches of B examples are computed at the same state, without
training. These are the micro-batches of one batch of n B examples, whose gradient is their mean. So
there are gradients g1 and g2 of two batch sizes, B1 = B and B2 = n B, on every mesh that can train:

  |G|^2 = (B2 |g2|^2 - B1 |g1|^2) / (B2 - B1)        |g1|^2 is a mean over the n batches
  tr(S) = (|g1|^2 - |g2|^2) / (1/B1 - 1/B2)

Both are unbiased; their ratio is not. To average several measurements, average the two and divide
then. The noise is all that training has: images, crops, colour noise and dropout masks. As in
training, batch norm uses the statistics of each batch of B.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnn_spmd.data.feed import DeviceData
from cnn_spmd.data.sharded import Indices
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.step import StepFunctions, TrainState


class NoiseScale:
    """The program that adds up gradients, and the batches that it sees."""

    def __init__(self, setup: Setup):
        """The training data must be on the devices already (Feed.load)."""
        self.setup = setup
        place, abstract = setup.place, setup.functions.abstract_state
        shardings = place.of_state(abstract).params
        self._zeros = jax.jit(
            lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=shardings
        )
        self._add_gradient = jax.jit(
            functools.partial(add_gradient, setup.functions),
            donate_argnums=0,
            out_shardings=(shardings, place.replicated, place.replicated),
        )

    def measure(self, state: TrainState) -> dict[str, float]:
        """Return gradient_norm2, trace and noise_scale, as `estimate`, for a state.

        The batches are those of the next config.noise_scale steps; at the end of a run, those of
        its last steps. They are at most an epoch, in which no example comes twice.
        """
        config = self.setup.config
        batches = config.noise_scale
        start = max(min(int(state.step), config.steps - batches), 0)
        feed, _ = self.setup.feeds
        total, of_each = self._zeros(state.params), []
        for step, inputs in enumerate(feed.calls(self.setup.indices(start, batches)), start):
            total, of_one, of_total = self._add_gradient(total, state, np.int32(step), *inputs)
            of_each.append(float(of_one))
        return estimate(of_each, float(of_total), config.batch_size)


def add_gradient(
    functions: StepFunctions,
    total: nnx.State,
    state: TrainState,
    step: jax.Array,
    data: DeviceData,
    indices_B: Indices,
) -> tuple[nnx.State, jax.Array, jax.Array]:
    """Add the gradient of a batch to `total`; return that, and the squared norms [] of both.

    step: decides on crops and dropout masks, as in training.
    """
    grads, _, _ = functions.gradients(state._replace(step=step), data, indices_B)
    total = jax.tree.map(jnp.add, total, grads)
    return total, *(optax.tree.norm(each, squared=True) for each in (grads, total))


def estimate(of_each: Sequence[float], of_sum: float, batch_size: int) -> dict[str, float]:
    """Return the estimates of |G|^2 (gradient_norm2) and tr(S) (trace), and noise_scale.

    of_each: the squared norm of each batch's gradient; of_sum: that of the sum of the gradients.
    noise_scale is left out where the estimate of |G|^2 is not positive: noise hides the gradient.
    """
    batches = len(of_each)
    small, large = batch_size, batches * batch_size
    of_small, of_large = float(np.mean(of_each)), of_sum / batches**2
    norm2 = (large * of_large - small * of_small) / (large - small)
    trace = (of_small - of_large) / (1 / small - 1 / large)
    found = dict(gradient_norm2=norm2, trace=trace, batches=batches)
    return found | dict(noise_scale=trace / norm2) if norm2 > 0 else found
