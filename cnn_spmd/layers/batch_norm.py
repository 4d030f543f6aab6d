"""Normalise each channel over the batch (Ioffe and Szegedy 2015, arXiv 1502.03167).

Shapes: N batch, H height, W width, C channels; G groups of examples with statistics of their own.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import FAST_FORMS
from cnn_spmd.sharding.placement import UNPLACED


class BatchNorm(nnx.Module):
    """Subtract the mean of each channel and divide by its deviation; then scale and shift.

    In training these are statistics of the batch. With per_device=False that is the global batch:
    every mesh computes the same numbers, and the devices sum two numbers per channel, forward and
    backward. With per_device=True each device uses its own examples, as papers on several GPUs did:
    no device waits for another one, and the numbers depend on the mesh.

    Evaluation uses running averages of the statistics. They are model state, in float32; with
    per_device=True they are means over the devices. As in torch's BatchNorm2d, the variance that
    normalises is divided by the number of elements n, and the one that is averaged by n - 1.
    """

    def __init__(
        self,
        channels: int,
        *,
        axis: str = "conv_out",
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        affine: bool = True,
        per_device: bool = False,
    ):
        """Build the parameters and the running averages, in float32.

        axis: the logical axis of the channels. momentum: the share of a running average that a step
        keeps (torch's momentum is 1 minus this). affine: learn a scale and a bias per channel.
        """
        self.momentum, self.epsilon, self.per_device = momentum, epsilon, per_device
        zeros, ones = jnp.zeros(channels, jnp.float32), jnp.ones(channels, jnp.float32)
        self.scale = nnx.Param(ones, axes=(axis,)) if affine else None
        self.bias = nnx.Param(zeros, axes=(axis,)) if affine else None
        # For the closed form: in which phases the devices sum two numbers per channel.
        phases = ("forward",) if per_device and not affine else ("forward", "backward")
        self.mean = nnx.BatchStat(zeros, axes=(axis,), sums=phases)
        self.variance = nnx.BatchStat(ones, axes=(axis,), sums=phases)

    def __call__(
        self,
        name: str,
        x_NHWC: jax.Array,
        place=UNPLACED,
        train: bool = False,
        fast_forms=FAST_FORMS,
    ) -> jax.Array:
        """Return the normalised maps, of x's dtype, computed in float32 or wider.

        name: the layer's, such as "norm1", for the placement report. train: use the statistics of
        the batch, and update the running averages.
        """
        if self.per_device and place.splits("image_height"):
            raise UserError(
                f"model.batch_norm=per_device: parallelism={place.parallelism} splits the height "
                f"of the maps that {name} normalises, expected global"
            )
        axes = place.map_axes(x_NHWC.shape[1], *self.mean.axes)
        x_NHWC = place(x_NHWC, *axes, name=f"{name} input")
        mean_C, variance_C = self.mean[...], self.variance[...]
        scale_C = jnp.ones_like(mean_C) if self.scale is None else self.scale[...]
        bias_C = jnp.zeros_like(mean_C) if self.bias is None else self.bias[...]
        if not train:
            return _normalise(x_NHWC, mean_C, variance_C, scale_C, bias_C, self.epsilon)
        groups = place.shards("conv_batch") if self.per_device else 1
        x_GNHWC = x_NHWC.reshape(groups, -1, *x_NHWC.shape[1:])
        norm = _own_gradient_norm if "own_gradients" in fast_forms else _plain_norm
        y_GNHWC, mean_GC, variance_GC = norm(x_GNHWC, scale_C, bias_C, self.epsilon)
        elements = _elements(x_GNHWC)
        self._average(self.mean, mean_GC)
        self._average(self.variance, variance_GC * (elements / max(elements - 1, 1)))
        return place(y_GNHWC.reshape(x_NHWC.shape), *axes)

    def _average(self, running: nnx.BatchStat, now_GC: jax.Array) -> None:
        """Move a running average towards the mean over the groups."""
        now_C = jax.lax.stop_gradient(now_GC).mean(0)
        average_C = self.momentum * running[...] + (1 - self.momentum) * now_C
        # Not running[...] = ...: while JAX traces, that takes longer with each operation before it.
        running.set_value(average_C.astype(running.dtype))


def _plain_norm(x_GNHWC, scale_C, bias_C, epsilon):
    """Return the maps, normalised within each group, and mean and variance [G, C]."""
    x_wide = _wide(x_GNHWC)
    # Both sums come from one pass over x, and XLA adds both up over the devices at once.
    mean_GC, square_GC = x_wide.mean((1, 2, 3)), jnp.square(x_wide).mean((1, 2, 3))
    variance_GC = jnp.maximum(square_GC - jnp.square(mean_GC), 0)
    statistics = _on_maps(mean_GC), _on_maps(variance_GC)
    return _normalise(x_GNHWC, *statistics, scale_C, bias_C, epsilon), mean_GC, variance_GC


def _normalise(x, mean, variance, scale, bias, epsilon):
    inverse = jax.lax.rsqrt(variance + epsilon)
    return ((_wide(x) - mean) * inverse * scale + bias).astype(x.dtype)


def _elements(x_GNHWC) -> int:
    """Return how many elements a channel has in a group."""
    return math.prod(x_GNHWC.shape[1:4])


def _on_maps(statistic_GC):
    return statistic_GC[:, None, None, None]


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# The fast form ("own_gradients"): its gradient keeps x alone, and needs two sums per channel, which
# are also the gradients of scale and bias. Autodiff keeps x in float32 and needs four sums.


_own_gradient_norm = jax.custom_vjp(_plain_norm, nondiff_argnums=(3,))


def _forward(x_GNHWC, scale_C, bias_C, epsilon):
    results = _plain_norm(x_GNHWC, scale_C, bias_C, epsilon)
    return results, (x_GNHWC, scale_C, *results[1:])


def _backward(epsilon, kept, gradients):
    """Return the gradients by x, scale and bias.

    Those of the two statistics are zero: they go to the running averages.
    """
    x_GNHWC, scale_C, mean_GC, variance_GC = kept
    gradient, inverse_GC = _wide(gradients[0]), jax.lax.rsqrt(variance_GC + epsilon)
    normal = (_wide(x_GNHWC) - _on_maps(mean_GC)) * _on_maps(inverse_GC)
    by_bias_GC, by_scale_GC = gradient.sum((1, 2, 3)), (gradient * normal).sum((1, 2, 3))
    through_statistics = _on_maps(by_bias_GC) + normal * _on_maps(by_scale_GC)
    by_x = gradient - through_statistics / _elements(x_GNHWC)
    by_x = (by_x * _on_maps(inverse_GC * scale_C)).astype(x_GNHWC.dtype)
    by_scale, by_bias = (sums.sum(0).astype(scale_C.dtype) for sums in (by_scale_GC, by_bias_GC))
    return by_x, by_scale, by_bias


_own_gradient_norm.defvjp(_forward, _backward)
