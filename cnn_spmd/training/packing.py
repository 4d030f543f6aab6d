"""Float32 weights as two halves, of which the layers read the bfloat16 one.

Only the fast path of a bfloat16 run uses this (the lever "cast_once").
"""

import jax
import jax.numpy as jnp
from flax import nnx


def split_weight(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A float32 weight as the nearest bfloat16, which the layers read as it is, and an int16 with the rest of its bits.

    Together they are the 4 bytes of the weight, to the last bit (or NaN again); a bfloat16 copy beside it would be 2 more to
    write. Of two that are equally near it takes the larger, where a cast takes the even one.
    """
    bits = jax.lax.bitcast_convert_type(weight, jnp.int32)
    near = jnp.where(jnp.isnan(weight), 0x7FC0, (bits + 2**15) >> 16)  # of a NaN, whose sum may overflow: another NaN
    return jax.lax.bitcast_convert_type(near.astype(jnp.int16), jnp.bfloat16), (bits - (near << 16)).astype(jnp.int16)


def join_weight(near: jax.Array, rest: jax.Array) -> jax.Array:
    """The float32 weight that split_weight split."""
    bits = jax.lax.bitcast_convert_type(near, jnp.int16).astype(jnp.int32) << 16
    return jax.lax.bitcast_convert_type(bits + rest.astype(jnp.int32), jnp.float32)


def read(params: nnx.State) -> nnx.State:
    """The weights as the layers read them: of halves the bfloat16."""
    return jax.tree.map(lambda x: x[0] if isinstance(x, tuple) else x, params, is_leaf=lambda x: isinstance(x, tuple))


def whole(params: nnx.State) -> nnx.State:
    """The weights as the optimizer needs them: halves joined."""
    return jax.tree.map(lambda x: join_weight(*x) if isinstance(x, tuple) else x, params,
                        is_leaf=lambda x: isinstance(x, tuple))
