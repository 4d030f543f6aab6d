"""Carry float32 weights as two 16-bit halves, of which layers read one.

A bfloat16 run needs each weight twice: in float32 for the update, in bfloat16 for the products. A
bfloat16 copy beside the float32 weight is 2 more bytes to write and read per weight. Packed, both
share the same 4 bytes. The steps of a chunk hand on packed weights (the lever "cast_once"); a state
that leaves a chunk is plain again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def pack_bf16(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split a float32 weight into the nearest bfloat16 and an int16 with the rest.

    Together they are the weight, to the last bit (a NaN becomes another NaN). Where two bfloat16
    are equally near, this takes the larger one; a cast takes the even one.
    """
    bits = jax.lax.bitcast_convert_type(weight, jnp.int32)
    nan = 0x7FC0  # rounding the bits of a NaN up may overflow
    near = jnp.where(jnp.isnan(weight), nan, (bits + 2**15) >> 16)
    rest = (bits - (near << 16)).astype(jnp.int16)
    return jax.lax.bitcast_convert_type(near.astype(jnp.int16), jnp.bfloat16), rest


def unpack_f32(near: jax.Array, rest: jax.Array) -> jax.Array:
    """Join what pack_bf16 split: the float32 weight, to the last bit."""
    bits = jax.lax.bitcast_convert_type(near, jnp.int16).astype(jnp.int32) << 16
    return jax.lax.bitcast_convert_type(bits + rest.astype(jnp.int32), jnp.float32)


def pack_weights(params: nnx.State) -> nnx.State:
    """Pack each float32 weight: a pair of pack_bf16 takes its place."""
    return jax.tree.map(pack_bf16, params)


def f32_weights(params: nnx.State) -> nnx.State:
    """Return the weights as the optimizer needs them, float32: pairs are joined."""
    return _each(lambda x: unpack_f32(*x) if isinstance(x, tuple) else x, params)


def layer_weights(params: nnx.State) -> nnx.State:
    """Return the weights as the layers read them: the bfloat16 half of each pair."""
    return _each(lambda x: x[0] if isinstance(x, tuple) else x, params)


def _each(f: Callable, params: nnx.State) -> nnx.State:
    return jax.tree.map(f, params, is_leaf=lambda x: isinstance(x, tuple))


def pack(state: Any) -> Any:
    """Return a TrainState with packed weights."""
    return state._replace(params=pack_weights(state.params))


def unpack(state: Any) -> Any:
    """Return a packed TrainState with plain float32 weights."""
    return state._replace(params=f32_weights(state.params))


def packed_step(train_step: Callable) -> Callable:
    """Wrap a train step so that it takes and returns packed states."""

    def step(state, data, indices_B):
        weights = layer_weights(state.params)
        state, metrics = train_step(unpack(state), data, indices_B, weights)
        return pack(state), metrics

    return step
