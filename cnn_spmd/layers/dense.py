"""Dense layers, their dropout, and the way from a map of features to them.

A layer's input is placed as its kernel's rows are, its output as its kernel's columns are.
Shapes: N batch, H height, W width, C channels; B batch and F features of a dense layer.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from cnn_spmd.layers.common import HE


def dense(
    name: str,
    features_in: int,
    features_out: int,
    *,
    dtype,
    rngs,
    kernel_init=HE,
    bias_init=nnx.initializers.zeros,
) -> nnx.Linear:
    """A dense layer with bias whose logical axes are `name`_in (rows) and `name`_out (columns)."""
    return nnx.Linear(
        features_in,
        features_out,
        dtype=dtype,
        kernel_init=kernel_init,
        kernel_metadata={"axes": (f"{name}_in", f"{name}_out"), "part": "dense"},
        bias_init=bias_init,
        bias_metadata={"axes": (f"{name}_out",), "part": "dense"},
        rngs=rngs,
    )


def flatten(x_NHWC: jax.Array, place) -> jax.Array:
    """[N, H, W, C] to [B, F]; channels that lie on several devices are gathered first, as a split F has no such order."""
    x_NHWC = place(x_NHWC, "conv_batch", None, None, None)
    return x_NHWC.reshape(len(x_NHWC), -1)


def hidden(
    name: str,
    layer: nnx.Linear,
    x_BF: jax.Array,
    place,
    rate: float,
    key: jax.Array | None,
    last: bool,
) -> jax.Array:
    """The dense `layer`, called `name`, its ReLU and dropout; the `last` one is followed by the output layer."""
    x_BF = place(x_BF, "dense_batch", f"{name}_in", name=f"{name} input")
    # Whole columns go straight to the output layer's batch: partial sums (of split rows) are then scattered as they are summed.
    batch = "output_batch" if last and place.shards(f"{name}_out") == 1 else "dense_batch"
    x_BF = place(nnx.relu(layer(x_BF)), batch, f"{name}_out", name=f"{name} output")
    return place(
        dropout(x_BF, rate, key), batch, f"{name}_out"
    )  # before the next gather, which else takes the mask


def dense_head(
    model: nnx.Module, x_BF: jax.Array, place, rate: float, key: jax.Array | None
) -> jax.Array:
    """AlexNet's end: the hidden layers fc1 and fc2, each with a dropout mask of its own, and the output layer fc3."""
    keys = (None, None) if key is None else jax.random.split(key)
    x_BF = hidden("fc1", model.fc1, x_BF, place, rate, keys[0], last=False)
    x_BF = hidden("fc2", model.fc2, x_BF, place, rate, keys[1], last=True)
    return logits(model.fc3, x_BF, place)


def logits(layer: nnx.Linear, x_BF: jax.Array, place) -> jax.Array:
    """The output `layer`, fc3."""
    x_BF = place(x_BF, "output_batch", "fc3_in", name="fc3 input")
    return place(layer(x_BF), "output_batch", "fc3_out", name="fc3 output")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales up the rest; no key (evaluation) leaves x as it is.

    The mask is drawn for the logical array, so it is the same on every mesh.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(
        x.dtype
    )
