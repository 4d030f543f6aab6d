"""Build and apply dense layers with dropout; flatten maps to vectors.

A layer's input is placed as the rows of its kernel are, its output as the columns are.

Shapes: N batch, H height, W width, C channels; B batch, F features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import HE
from cnn_spmd.sharding.placement import axes_of


def dense(
    name: str,
    features_in: int,
    features_out: int,
    *,
    use_bias: bool = True,
    dtype,
    rngs: nnx.Rngs,
    kernel_init=HE,
    bias_init=nnx.initializers.zeros,
) -> nnx.Linear:
    """Build a dense layer with float32 parameters that computes in `dtype`.

    name: "fc1" and "fc2" for hidden layers, "fc3" for the output layer. The logical axes of the
    kernel are `name`_in (rows) and `name`_out (columns). part="dense" marks the parameters for
    training/, which may update dense layers and convolutions differently.
    """
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        kernel_metadata={"axes": (f"{name}_in", f"{name}_out"), "part": "dense"},
        bias_init=bias_init,
        bias_metadata={"axes": (f"{name}_out",), "part": "dense"},
        rngs=rngs,
    )


def flatten(x_NHWC: jax.Array, place) -> jax.Array:
    """Return a map [N, H, W, C] as [B, F], with B = N and F = H * W * C.

    Channels that several devices share are gathered first: a split F would have another order.
    Where the height is split, devices trade rows for examples.
    """
    x_NHWC = place(x_NHWC, place.features_batch, None, None, None)
    return x_NHWC.reshape(len(x_NHWC), -1)


def hidden(
    layer: nnx.Linear,
    x_BF: jax.Array,
    place,
    rate: float,
    key: jax.Array | None,
    last: bool = False,
) -> jax.Array:
    """Apply the hidden dense `layer`, its ReLU and its dropout.

    rate, key: as for dropout. last: the output layer follows.
    """
    name = _name_of(layer)
    batch = place.hidden_output_batch(name) if last else "dense_batch"
    x_BF = place(x_BF, "dense_batch", f"{name}_in", name=f"{name} input")
    x_BF = place(nnx.relu(_linear(layer, x_BF, place)), batch, f"{name}_out", name=f"{name} output")
    # Placed once more after dropout: otherwise XLA may gather the mask for the next layer too.
    return place(dropout(x_BF, rate, key), batch, f"{name}_out")


def logits(layer: nnx.Linear, x_BF: jax.Array, place) -> jax.Array:
    """Apply the output `layer`; returns [B, classes]. Raises UserError if it is not called fc3."""
    if (name := _name_of(layer)) != "fc3":
        raise UserError(f'dense("{name}", ...): is the output layer, expected dense("fc3", ...)')
    x_BF = place(x_BF, "output_batch", "fc3_in", name="fc3 input")
    return place(_linear(layer, x_BF, place), "output_batch", "fc3_out", name="fc3 output")


def _name_of(layer: nnx.Linear) -> str:
    """Return the name that `dense` gave a layer."""
    rows, _ = axes_of(layer.kernel)
    return rows.removesuffix("_in")


def _linear(layer: nnx.Linear, x_BF: jax.Array, place) -> jax.Array:
    """Apply `layer`, with its kernel brought from where it lies at rest."""
    x_BF = place.product(jnp.dot, x_BF.astype(layer.dtype), layer.kernel, layer.dtype)
    return x_BF if layer.bias is None else x_BF + layer.bias[...].astype(layer.dtype)


def dropout_keys(key: jax.Array | None, layers: int) -> list[jax.Array | None] | jax.Array:
    """Return a dropout key per hidden layer; without a key, a None for each."""
    return [None] * layers if key is None else jax.random.split(key, layers)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each element with probability `rate` and divide the others by 1 - rate.

    Without a key, as in evaluation, x stays as it is. The mask is drawn for the logical array, so
    it is the same on every mesh.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
