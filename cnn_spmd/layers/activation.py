"""Add a bias and apply an activation; for ReLU, with a gradient of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


def activate(x: jax.Array, bias_C: jax.Array | None, activation: Callable, fast_forms) -> jax.Array:
    """Return activation(x + bias_C), the bias along the last axis, or None."""
    if bias_C is None:
        return activation(x)
    if activation is nnx.relu and "own_gradients" in fast_forms:
        return bias_relu(x, bias_C)
    return activation(x + bias_C)


# The fast form ("own_gradients").


@jax.custom_vjp
def bias_relu(x: jax.Array, bias_C: jax.Array) -> jax.Array:
    """Return relu(x + bias_C) with a gradient that needs only the result.

    The next layer keeps the result anyway. Autodiff of jax.nn.relu would also keep x + bias_C, and
    the GPU would write it to memory. Without it, cuDNN computes a convolution, its bias and its
    ReLU in one kernel. The bias's gradient is summed in float32. Applies to ReLU only.
    """
    return jnp.maximum(x + bias_C, 0)


def _bias_relu_forward(x, bias_C):
    return bias_relu(x, bias_C), (bias_relu(x, bias_C), bias_C)


def _bias_relu_backward(kept, gradient):
    result, bias_C = kept
    # Not "> 0": XLA would trace that back to x + bias_C, and keep it after all.
    gradient = jnp.where(result != 0, gradient, 0)
    return gradient, bias_gradient(bias_C, gradient)


bias_relu.defvjp(_bias_relu_forward, _bias_relu_backward)


def bias_gradient(bias_C: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the bias's gradient: the sum over all axes except the last.

    The sum is computed in float32 or wider, and has bias_C's dtype.
    """
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    return gradient.sum(tuple(range(gradient.ndim - 1)), dtype=wide).astype(bias_C.dtype)
