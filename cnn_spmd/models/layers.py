"""Layers that carry logical axes, so that placement.py can say where their arrays live.

A layer's input is placed as its kernel's rows are, its output as its kernel's columns are.
Shapes: N batch, H height, W width, C channels; B batch and F features of a dense layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

HE = nnx.initializers.he_normal()  # keeps the variance through a ReLU (He et al. 2015, 1502.01852, eq. 10)
SMALL = nnx.initializers.normal(0.01)  # of AlexNet 2012 (section 5), and of output layers: training starts from even odds
ONES = nnx.initializers.ones


class Unplaced:
    """The `place` of a network on one device: leaves every array where it is."""

    def __call__(self, x: jax.Array, *axes: str | None, name: str = "") -> jax.Array:
        return x

    def towers(self, f, groups, *arrays, out, name=""):
        return f(0, *(array for array, _ in arrays))


UNPLACED = Unplaced()


def conv(channels_in: int, channels_out: int, window: int, *, strides: int = 1, padding="SAME", groups: int = 1,
         dtype, rngs, kernel_init=HE, bias_init=nnx.initializers.zeros) -> nnx.Conv:
    """A square 2-D convolution, NHWC by HWIO, with bias; float32 parameters, computed in `dtype`.

    groups > 1: the channels fall into towers that do not see each other (AlexNet 2012, figure 2); stride 1, SAME.
    """
    rows, columns = ("conv_in", "conv_out") if groups == 1 else (None, "group_out")
    return nnx.Conv(channels_in, channels_out, (window, window), strides, padding=padding, feature_group_count=groups,
                    dtype=dtype, kernel_init=kernel_init, kernel_metadata={"axes": (None, None, rows, columns)},
                    bias_init=bias_init, bias_metadata={"axes": (columns,)}, rngs=rngs)


def dense(name: str, features_in: int, features_out: int, *, dtype, rngs, kernel_init=HE,
          bias_init=nnx.initializers.zeros) -> nnx.Linear:
    """A dense layer with bias whose logical axes are `name`_in (rows) and `name`_out (columns)."""
    return nnx.Linear(features_in, features_out, dtype=dtype,
                      kernel_init=kernel_init, kernel_metadata={"axes": (f"{name}_in", f"{name}_out")},
                      bias_init=bias_init, bias_metadata={"axes": (f"{name}_out",)}, rngs=rngs)


def conv_relu(name: str, layer: nnx.Conv, x_NHWC: jax.Array, place) -> jax.Array:
    """The convolution `layer`, called `name`, and a ReLU."""
    if layer.feature_group_count > 1:
        return nnx.relu(_grouped(name, layer, x_NHWC, place))
    x_NHWC = place(x_NHWC, "conv_batch", None, None, "conv_in", name=f"{name} input")
    return place(nnx.relu(layer(x_NHWC)), "conv_batch", None, None, "conv_out", name=f"{name} output")


def _grouped(name: str, layer: nnx.Conv, x_NHWC: jax.Array, place) -> jax.Array:
    """A convolution in groups, as one convolution a group: XLA partitions a grouped one by gathering the whole batch."""
    inputs, outputs = ("conv_batch", None, None, "group_in"), ("conv_batch", None, None, "group_out")

    def convolve(part, x_NHWC, kernel_HWIO):  # the columns that this device holds: some groups, or a part of one
        rows, columns = kernel_HWIO.shape[2:]
        of_a_group = layer.out_features // layer.feature_group_count
        groups = max(1, columns // of_a_group)
        if x_NHWC.shape[-1] > groups * rows:  # all channels are here
            x_NHWC = jax.lax.dynamic_slice_in_dim(x_NHWC, part * columns // of_a_group * rows, groups * rows, -1)
        return jnp.concatenate([
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            for x, kernel in zip(jnp.split(x_NHWC, groups, -1), jnp.split(kernel_HWIO, groups, -1), strict=True)], -1)

    x_NHWC = place(x_NHWC, *inputs, name=f"{name} input")
    kernel, bias = (array.astype(layer.dtype) for array in (layer.kernel[...], layer.bias[...]))
    x_NHWC = place.towers(convolve, layer.feature_group_count, (x_NHWC, inputs), (kernel, layer.kernel.axes),
                          out=outputs, name=name)
    return place(x_NHWC + bias, *outputs, name=f"{name} output")


def flatten(x_NHWC: jax.Array, place) -> jax.Array:
    """[N, H, W, C] to [B, F]; channels that lie on several devices are gathered first, as a split F has no such order."""
    x_NHWC = place(x_NHWC, "conv_batch", None, None, None)
    return x_NHWC.reshape(len(x_NHWC), -1)


def hidden(name: str, layer: nnx.Linear, x_BF: jax.Array, place, rate: float, key: jax.Array | None) -> jax.Array:
    """The dense `layer`, called `name`, a ReLU and dropout."""
    x_BF = place(x_BF, "dense_batch", f"{name}_in", name=f"{name} input")
    x_BF = place(nnx.relu(layer(x_BF)), "dense_batch", f"{name}_out", name=f"{name} output")
    return place(dropout(x_BF, rate, key), "dense_batch", f"{name}_out")  # before the next gather, which else takes the mask


def dense_head(model: nnx.Module, x_BF: jax.Array, place, rate: float, key: jax.Array | None) -> jax.Array:
    """AlexNet's end: the hidden layers fc1 and fc2, each with a dropout mask of its own, and the output layer fc3."""
    keys = (None, None) if key is None else jax.random.split(key)
    x_BF = hidden("fc1", model.fc1, x_BF, place, rate, keys[0])
    x_BF = hidden("fc2", model.fc2, x_BF, place, rate, keys[1])
    return logits("fc3", model.fc3, x_BF, place)


def logits(name: str, layer: nnx.Linear, x_BF: jax.Array, place) -> jax.Array:
    """The output `layer`, called `name`."""
    x_BF = place(x_BF, "output_batch", f"{name}_in", name=f"{name} input")
    return place(layer(x_BF), "output_batch", f"{name}_out", name=f"{name} output")


def pool(x_NHWC: jax.Array, place, channels: str, **settings) -> jax.Array:
    """max_pool, its result placed as its input is: else XLA may gather the larger input for what comes next."""
    return place(max_pool(x_NHWC, **settings), "conv_batch", None, None, channels)


def max_pool(x_NHWC: jax.Array, window: int, strides: int, ceil: bool = False) -> jax.Array:
    """Max over square windows; windows wider than the stride overlap (Krizhevsky et al. 2012, section 3.4).

    ceil: a last window that reaches over the edge counts, as in cuda-convnet; else it is left out.
    Windows that neither overlap nor leave a gap are a reshape and a max: its gradient fuses into elementwise code, where
    that of a general pool is a scatter (CIFAR-size AlexNet's step on an H200, batch 512: 1.86 ms against 2.35 ms). Among
    equal maxima of a window the gradient is then shared, instead of given to the first. Others are two maxima in a row.
    """
    height, width = x_NHWC.shape[1:3]
    if window == strides and height % window == 0 and width % window == 0:
        batch, channels = len(x_NHWC), x_NHWC.shape[-1]
        return x_NHWC.reshape(batch, height // window, window, width // window, window, channels).max((2, 4))
    return _max_along(1, _max_along(2, x_NHWC, window, strides, ceil), window, strides, ceil)


def _max_along(dimension: int, x: jax.Array, window: int, strides: int, ceil: bool) -> jax.Array:
    """Max over windows of one dimension: elementwise maxima of strided slices, which any partitioning leaves in place."""
    overhang = _overhang(x.shape[dimension], window, strides) if ceil else 0
    if overhang:
        x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, overhang if i == dimension else 0, 0) for i in range(x.ndim)])
    last = (x.shape[dimension] - window) // strides * strides
    return functools.reduce(jnp.maximum, (jax.lax.slice_in_dim(x, start, start + last + 1, strides, dimension)
                                          for start in range(window)))


def average_pool(x_NHWC: jax.Array, window: int, strides: int) -> jax.Array:
    """Mean over square windows, ceil mode, as in cuda-convnet: a window over the edge is divided by the area inside."""
    padding = [(0, _overhang(size, window, strides)) for size in x_NHWC.shape[1:3]]
    sums = jax.lax.reduce_window(x_NHWC, np.zeros((), x_NHWC.dtype), jax.lax.add, (1, window, window, 1),
                                 (1, strides, strides, 1), [(0, 0), *padding, (0, 0)])
    inside = [np.minimum(window, size - strides * np.arange(count))
              for size, count in zip(x_NHWC.shape[1:3], sums.shape[1:3], strict=True)]
    return sums / np.outer(*inside)[None, :, :, None].astype(x_NHWC.dtype)


def _overhang(size: int, window: int, strides: int) -> int:
    """How far the last window reaches over the edge in ceil mode."""
    return -(size - window) % strides


def response_norm(x_NHWC: jax.Array, *, size: int, alpha: float, beta: float, k: float, within_map: bool = False) -> jax.Array:
    """x / (k + alpha * sum of x^2 over a window of `size`) ** beta, the window clipped at the edges.

    Across maps: `size` neighbouring channels (Krizhevsky et al. 2012, section 3.3). within_map: a square of `size` x `size`
    pixels of the same channel. alpha multiplies each term, as in that paper's formula. Krizhevsky's code divides its
    `scale` by the number of terms instead: for its settings pass scale / size (across maps) or scale / size**2 (within a
    map), with k = 1 in cuda-convnet. AlexNet's published 1e-4 is such a scale: 2e-5 a term.
    """
    window = (1, size, size, 1) if within_map else (1, 1, 1, size)
    padding = [(0, 0) if n == 1 else ((n - 1) // 2, n // 2) for n in window]
    squares = jnp.square(x_NHWC.astype(jnp.float32))
    sums = jax.lax.reduce_window(squares, np.float32(0), jax.lax.add, window, (1, 1, 1, 1), padding)
    return (x_NHWC * (k + alpha * sums) ** -beta).astype(x_NHWC.dtype)


def response_norm_of_towers(x_NHWC: jax.Array, groups: int, place, name: str, **settings) -> jax.Array:
    """response_norm across the maps of each of `groups` towers by itself, as AlexNet's two GPUs did: nothing crosses."""
    axes, width = ("conv_batch", None, None, "group_in"), x_NHWC.shape[-1] // groups

    def norm(_, x_NHWC):
        towers = jnp.split(x_NHWC, x_NHWC.shape[-1] // width, -1)
        return jnp.concatenate([response_norm(x, **settings) for x in towers], -1)

    return place.towers(norm, groups, (place(x_NHWC, *axes, name=f"{name} input"), axes), out=axes, name=name)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales up the rest; no key (evaluation) leaves x as it is.

    The mask is drawn for the logical array, so it is the same on every mesh.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
