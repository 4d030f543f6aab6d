"""Float32 weights as two halves, of which the layers read the bfloat16 one.

Only the fast path of a bfloat16 run uses this (the lever "cast_once").
"""

import jax
import jax.numpy as jnp
from flax import nnx


def pack_bf16(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split a float32 weight into the nearest bfloat16 and an int16 with the rest of its bits.

    The layers read the bfloat16 as it is. Together the two are the 4 bytes of the weight, to the last
    bit (a NaN becomes another NaN); a bfloat16 copy beside the weight would be 2 more bytes to write.
    Where two bfloat16 are equally near, this takes the larger one; a cast takes the even one.
    """
    bits = jax.lax.bitcast_convert_type(weight, jnp.int32)
    near = jnp.where(
        jnp.isnan(weight), 0x7FC0, (bits + 2**15) >> 16
    )  # of a NaN, whose sum may overflow: another NaN
    return jax.lax.bitcast_convert_type(near.astype(jnp.int16), jnp.bfloat16), (
        bits - (near << 16)
    ).astype(jnp.int16)


def unpack_f32(near: jax.Array, rest: jax.Array) -> jax.Array:
    """Join what pack_bf16 split: the float32 weight, to the last bit."""
    bits = jax.lax.bitcast_convert_type(near, jnp.int16).astype(jnp.int32) << 16
    return jax.lax.bitcast_convert_type(bits + rest.astype(jnp.int32), jnp.float32)


def layer_weights(params: nnx.State) -> nnx.State:
    """Give the weights as the layers read them: the bfloat16 half of those that are packed."""
    return jax.tree.map(
        lambda x: x[0] if isinstance(x, tuple) else x,
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def f32_weights(params: nnx.State) -> nnx.State:
    """Give the weights as the optimizer needs them, float32: packed ones are joined."""
    return jax.tree.map(
        lambda x: unpack_f32(*x) if isinstance(x, tuple) else x,
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )
