"""Bring kernels from where they lie between steps to where layers use them.

A row of the placement table may have `at_rest`: a kernel, and all that the optimizer keeps of it,
is then split over more devices between steps than in its use. Layers reach this module as
`place.product`; the argument `place` is that Placement.

Each kernel is cast to the compute dtype and then gathered, so that bfloat16 moves. The sum of its
gradient is split at once, and each device updates its shard. XLA for GPUs sums and splits in one
reduce-scatter; XLA for CPUs sums on every device (all-reduce), and each device keeps its shard.

A row without `gather_again` (sharded_update) leaves the order to XLA. The GPU compiler then gathers
early and joins small collectives; all kernels and all gradients may be whole at once. A row with
`gather_again` (fsdp) takes one layer after another: LayerByLayer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding


def product(place, f: Callable, x: jax.Array, kernel: nnx.Param, dtype: Any) -> jax.Array:
    """Return f(x, kernel), with the kernel cast to `dtype` and where the row uses it.

    f: linear in x and in the kernel, such as a convolution.
    """
    weight = kernel[...].astype(dtype)
    if "at_rest" not in place.row or not hasattr(kernel, "axes"):
        return f(x, weight)
    layout = kernel.axes, kernel.shape, "kernel"
    rest, used = place.sharding_at_rest(*layout), place.sharding(*layout)
    if rest == used:
        return f(x, weight)
    if "gather_again" not in place.row:
        return f(x, _gathered(weight, rest, used))
    return LayerByLayer(f, rest, used, place.row["gather_again"])(x, weight)


def _moved(weight: jax.Array, rest: NamedSharding, used: NamedSharding) -> jax.Array:
    """Gather a weight.

    The first constraint keeps XLA from choosing another place for the shards.
    """
    weight = jax.lax.with_sharding_constraint(weight, rest)
    return jax.lax.with_sharding_constraint(weight, used)


def _split_gradient(rest, used, _, gradient):
    """Split the gradient as the weight is at rest; autodiff would leave it as in use."""
    return (jax.lax.with_sharding_constraint(gradient, rest),)


_gathered = jax.custom_vjp(_moved, nondiff_argnums=(1, 2))
_gathered.defvjp(lambda weight, rest, used: (_moved(weight, rest, used), None), _split_gradient)


@dataclasses.dataclass(frozen=True)
class LayerByLayer:
    """Compute f(x, weight) and its gradients, each layer in its turn.

    Without constraints XLA gathers all weights as early as it can, and sums all gradients at the
    end. Barriers stop it: what comes out of an optimization barrier is not there before all that
    goes in. The price is that a device does not compute while it gathers.

    rest, used: where the weight lies between steps, and where f takes it. again: gather it again in
    the backward pass, instead of keeping it from the forward pass.
    """

    f: Callable
    rest: NamedSharding
    used: NamedSharding
    again: bool

    def __call__(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Return f(x, weight)."""
        differentiable = jax.custom_vjp(lambda x, weight: self.forward(x, weight)[0])
        differentiable.defvjp(self.forward, self.backward)
        return differentiable(x, weight)

    def forward(self, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple]:
        """Return f(x, weight), and what the backward pass needs."""
        # The gather waits for the layer's input.
        late_x, late_weight = jax.lax.optimization_barrier((x, weight))
        whole = _moved(late_weight, self.rest, self.used)
        return self.f(late_x, whole), (x, weight if self.again else whole)

    def backward(self, kept: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the gradients by x and by the weight."""
        # The gather waits for the gradient, and XLA cannot merge it with that of the forward pass.
        x, weight, gradient = jax.lax.optimization_barrier((*kept, gradient))
        whole = _moved(weight, self.rest, self.used) if self.again else weight
        (by_x,) = jax.vjp(lambda x: self.f(x, whole), x)[1](gradient)
        # From here on nothing needs the weight, and its gradient can take the same memory.
        by_x, x, gradient = jax.lax.optimization_barrier((by_x, x, gradient))
        (by_weight,) = jax.vjp(lambda weight: self.f(x, weight), whole)[1](gradient)
        by_weight = jax.lax.with_sharding_constraint(by_weight, self.rest)
        # The layer before waits until each device has its shard of the gradient's sum.
        return jax.lax.optimization_barrier((by_x, by_weight))
