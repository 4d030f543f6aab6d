"""Layers that carry logical axes, so that placement.py can say where their arrays live.

A layer's input is placed as its kernel's rows are, its output as its kernel's columns are.
Shapes: N batch, H height, W width, C channels; B batch and F features of a dense layer.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnn_spmd.models import convolutions, kernels

HE = nnx.initializers.he_normal()  # keeps the variance through a ReLU (He et al. 2015, 1502.01852, eq. 10)
SMALL = nnx.initializers.normal(0.01)  # of AlexNet 2012 (section 5), and of output layers: training starts from even odds
ONES = nnx.initializers.ones
# What makes a step faster and changes nothing but rounding, and which of equal maxima of a pool has the gradient;
# config.model.levers chooses. Each is told where it is used (the cast_once in step.py).
LEVERS = ("space_to_depth", "pool_first", "pool_index", "cast_once", "column_groups", "own_gradients")


class Unplaced:
    """The `place` of a network that is called by itself, as in a notebook or a test: leaves every array where it is."""

    record = None

    def __call__(self, x: jax.Array, *axes: str | None, name: str = "") -> jax.Array:
        return x

    def towers(self, f, groups, *arrays, out, name=""):
        return f(0, *(array for array, _ in arrays))

    def local(self, axes, f, *arrays):
        return f(*arrays)

    def parts_of(self, axis):
        return 1


UNPLACED = Unplaced()


def conv(channels_in: int, channels_out: int, window: int, *, strides: int = 1, padding: tuple[int, int] | None = None,
         groups: int = 1, dtype, rngs, kernel_init=HE, bias_init=nnx.initializers.zeros) -> nnx.Conv:
    """A square 2-D convolution, NHWC by HWIO, with bias; float32 parameters, computed in `dtype`.

    padding: zeros before and after, in both directions; None keeps the size of what stride 1 goes over.

    groups > 1: the channels fall into towers that do not see each other (AlexNet 2012, figure 2); stride 1, SAME.
    """
    rows, columns = ("conv_in", "conv_out") if groups == 1 else (None, "group_out")
    padding = [((window - 1) // 2, window // 2) if padding is None else padding] * 2
    return nnx.Conv(channels_in, channels_out, (window, window), (strides, strides), padding=padding,
                    feature_group_count=groups, dtype=dtype,
                    kernel_init=kernel_init, kernel_metadata={"axes": (None, None, rows, columns)},
                    bias_init=bias_init, bias_metadata={"axes": (columns,)}, rngs=rngs)


def dense(name: str, features_in: int, features_out: int, *, dtype, rngs, kernel_init=HE,
          bias_init=nnx.initializers.zeros) -> nnx.Linear:
    """A dense layer with bias whose logical axes are `name`_in (rows) and `name`_out (columns)."""
    return nnx.Linear(features_in, features_out, dtype=dtype,
                      kernel_init=kernel_init, kernel_metadata={"axes": (f"{name}_in", f"{name}_out")},
                      bias_init=bias_init, bias_metadata={"axes": (f"{name}_out",)}, rngs=rngs)


def conv_relu(name: str, layer: nnx.Conv, x_NHWC: jax.Array, place, levers=LEVERS, pool: dict | None = None,
              activation=nnx.relu) -> jax.Array:
    """The convolution `layer`, called `name`, its bias, its activation and, with `pool`, a max pool of these settings.

    Bias and ReLU grow with their argument and are the same everywhere in a map, so they change places with the pool to the
    last bit ("pool_first"): they, and the sum that is the bias's gradient, then go over a quarter of the numbers.
    """
    group = layer.feature_group_count > 1
    axes = ("conv_batch", None, None, "group_out" if group else "conv_out")
    if group:
        x_NHWC = convolutions.grouped(name, layer, x_NHWC, place)
    else:
        x_NHWC = place(x_NHWC, "conv_batch", None, None, "conv_in", name=f"{name} input")
        width = (x_NHWC.shape[2] + sum(layer.padding[1]) - layer.kernel_size[1]) // layer.strides[1] + 1
        x_NHWC = convolutions.products(layer, x_NHWC, levers, place.parts_of("conv_out") > 1, place.parts_of("conv_batch") > 1)
        more = x_NHWC.shape[2] - width  # columns, that the pool may leave out anyway (but a report has the map's shape)
        if place.record or not pool or pool.get("ceil") or (width - pool["window"]) % pool["strides"] + more >= pool["strides"]:
            x_NHWC = x_NHWC[:, :, :width]
    x_NHWC, bias_C = place(x_NHWC, *axes, name=f"{name} output"), layer.bias[...].astype(x_NHWC.dtype)
    if pool and "pool_first" in levers and activation is nnx.relu:
        return max_pool(x_NHWC, **pool, place=place, channels=axes[-1], levers=levers, bias_C=bias_C)
    own = activation is nnx.relu and "own_gradients" in levers
    x_NHWC = place(bias_relu(x_NHWC, bias_C) if own else activation(x_NHWC + bias_C), *axes)
    return max_pool(x_NHWC, **pool, place=place, channels=axes[-1], levers=levers) if pool else x_NHWC


@jax.custom_vjp
def bias_relu(x: jax.Array, bias_C: jax.Array) -> jax.Array:
    """relu(x + bias_C), the bias along the last axis ("own_gradients"); its gradient is summed in float32.

    The gradient looks at the result, which the next layer keeps anyway. What jax.nn.relu looks at, x + bias_C, is then never
    written: cuDNN makes one kernel of a convolution, its bias and the ReLU. (Not "> 0", which XLA traces back to x + bias_C.)
    """
    return jnp.maximum(x + bias_C, 0)


def _bias_relu_gradient(kept, gradient):
    result, bias_C = kept
    gradient = jnp.where(result != 0, gradient, 0)
    return gradient, _sum_to(bias_C, gradient)


bias_relu.defvjp(lambda x, bias_C: (bias_relu(x, bias_C), (bias_relu(x, bias_C), bias_C)), _bias_relu_gradient)


def _sum_to(bias_C: jax.Array, gradient: jax.Array) -> jax.Array:
    """The bias's gradient."""
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    return gradient.sum(tuple(range(gradient.ndim - 1)), dtype=wide).astype(bias_C.dtype)


def flatten(x_NHWC: jax.Array, place) -> jax.Array:
    """[N, H, W, C] to [B, F]; channels that lie on several devices are gathered first, as a split F has no such order."""
    x_NHWC = place(x_NHWC, "conv_batch", None, None, None)
    return x_NHWC.reshape(len(x_NHWC), -1)


def hidden(name: str, layer: nnx.Linear, x_BF: jax.Array, place, rate: float, key: jax.Array | None,
           last: bool) -> jax.Array:
    """The dense `layer`, called `name`, its ReLU and dropout; the `last` one is followed by the output layer."""
    x_BF = place(x_BF, "dense_batch", f"{name}_in", name=f"{name} input")
    # Whole columns go straight to the output layer's batch: partial sums (of split rows) are then scattered as they are summed.
    batch = "output_batch" if last and place.parts_of(f"{name}_out") == 1 else "dense_batch"
    x_BF = place(nnx.relu(layer(x_BF)), batch, f"{name}_out", name=f"{name} output")
    return place(dropout(x_BF, rate, key), batch, f"{name}_out")  # before the next gather, which else takes the mask


def dense_head(model: nnx.Module, x_BF: jax.Array, place, rate: float, key: jax.Array | None) -> jax.Array:
    """AlexNet's end: the hidden layers fc1 and fc2, each with a dropout mask of its own, and the output layer fc3."""
    keys = (None, None) if key is None else jax.random.split(key)
    x_BF = hidden("fc1", model.fc1, x_BF, place, rate, keys[0], last=False)
    x_BF = hidden("fc2", model.fc2, x_BF, place, rate, keys[1], last=True)
    return logits(model.fc3, x_BF, place)


def logits(layer: nnx.Linear, x_BF: jax.Array, place) -> jax.Array:
    """The output `layer`, fc3."""
    x_BF = place(x_BF, "output_batch", "fc3_in", name="fc3 input")
    return place(layer(x_BF), "output_batch", "fc3_out", name="fc3 output")


def max_pool(x_NHWC: jax.Array, window: int, strides: int, ceil: bool = False, *, place=UNPLACED, channels: str = "conv_out",
             levers=LEVERS, bias_C: jax.Array | None = None) -> jax.Array:
    """Max over square windows; windows wider than the stride overlap (Krizhevsky et al. 2012, section 3.4).

    ceil: a last window that reaches over the edge counts, as in cuda-convnet; else it is left out. channels: their logical
    axis; the result is placed as the input is, else XLA may gather the larger input for what comes next. bias_C: is added to
    the maxima, with a ReLU on top.
    The pool remembers where the first maximum of each window was ("pool_index"): a byte an output is all
    that the gradient needs. Without that lever, and for windows above kernels.WIDEST, windows that
    neither overlap nor leave a gap are a reshape and a max, among whose equal maxima the gradient is
    shared; others are two maxima in a row.
    """
    axes = ("conv_batch", None, None, channels)
    height, width = x_NHWC.shape[1:3]
    if "pool_index" in levers and window <= kernels.WIDEST:
        settings = Pool(window, strides, ceil, (height, width), functools.partial(place.local, axes))
        return place(_indexed_max_pool(x_NHWC, bias_C, settings), *axes)
    if window == strides and height % window == 0 and width % window == 0:
        parts = height // window, window, width // window, window
        x_NHWC = x_NHWC.reshape(len(x_NHWC), *parts, x_NHWC.shape[-1]).max((2, 4))
    else:
        x_NHWC = _max_along(1, _max_along(2, x_NHWC, window, strides, ceil), window, strides, ceil)
    x_NHWC = place(x_NHWC, *axes)
    if bias_C is None:
        return x_NHWC
    return place(bias_relu(x_NHWC, bias_C) if "own_gradients" in levers else nnx.relu(x_NHWC + bias_C), *axes)


def _max_along(dimension: int, x: jax.Array, window: int, strides: int, ceil: bool) -> jax.Array:
    """Max over windows of one dimension: elementwise maxima of strided slices, which any partitioning leaves in place."""
    return functools.reduce(jnp.maximum, _taps(dimension, x, window, strides, ceil))


def _taps(dimension: int, x: jax.Array, window: int, strides: int, ceil: bool) -> list[jax.Array]:
    """The first, second, ... element of every window along a dimension."""
    overhang = _overhang(x.shape[dimension], window, strides) if ceil else 0
    if overhang:
        x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, overhang if i == dimension else 0, 0) for i in range(x.ndim)])
    last = (x.shape[dimension] - window) // strides * strides
    return [jax.lax.slice_in_dim(x, start, start + last + 1, strides, dimension) for start in range(window)]


class Pool(NamedTuple):
    """A max pool that remembers its maxima: its settings, the size of what it pools, and `place.local` for its kernels."""

    window: int
    strides: int
    ceil: bool
    sizes: tuple[int, int]
    local: Callable


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _indexed_max_pool(x_NHWC, bias_C, pool):
    return _max_and_index(x_NHWC, bias_C, pool)[0]


def _max_and_index(x_NHWC, bias_C, pool):
    """The maxima (with a bias: relu(maximum + bias)), and what the gradient needs: where in its window each was."""
    counts = tuple((size + (_overhang(size, pool.window, pool.strides) if pool.ceil else 0) - pool.window) // pool.strides + 1
                   for size in pool.sizes)

    def choose(*arrays):
        return jax.lax.platform_dependent(
            *arrays, default=functools.partial(_plain_max_and_index, pool),
            cuda=functools.partial(kernels.max_and_index, window=pool.window, strides=pool.strides, counts=counts))

    largest, index = pool.local(choose, x_NHWC, *(() if bias_C is None else (bias_C,)))
    return largest, (index, bias_C)


def _plain_max_and_index(pool, x_NHWC, *bias_C):
    settings = pool.window, pool.strides, pool.ceil
    taps = [tap for rows in _taps(1, x_NHWC, *settings) for tap in _taps(2, rows, *settings)]
    largest, index = taps[0], jnp.zeros(taps[0].shape, jnp.uint8)
    for code, tap in enumerate(taps[1:], 1):
        larger = (tap > largest) | jnp.isnan(tap)
        largest, index = jnp.where(larger, tap, largest), jnp.where(larger, jnp.uint8(code), index)
    if bias_C:
        largest = jnp.maximum(largest + bias_C[0], 0)
        index = jnp.where(largest > 0, index, jnp.uint8(kernels.NONE))
    return largest, index


def _unpool(pool, kept, gradient):
    """Each pixel's gradient: of the few windows that hold it, those whose maximum it was; and the bias's."""
    (index, bias_C), settings = kept, dict(window=pool.window, strides=pool.strides, sizes=pool.sizes)

    def choose(index, gradient):
        return jax.lax.platform_dependent(index, gradient, cuda=functools.partial(kernels.unpool, **settings),
                                          default=functools.partial(_plain_unpool, **settings))

    bias_gradient = None if bias_C is None else _sum_to(bias_C, jnp.where(index == kernels.NONE, 0, gradient))
    return pool.local(choose, index, gradient), bias_gradient


def _plain_unpool(index, gradient, window, strides, sizes):
    blocks, reach, total = [-(-size // strides) for size in sizes], -(-window // strides), 0
    for row, column in np.ndindex(reach, reach):  # of the window that starts so many blocks before the pixel's own
        def shifted(x, value, by=(row, column)):
            widths = [(low, of - size - low, 0) for of, size, low in zip(blocks, x.shape[1:3], by, strict=True)]
            x = jax.lax.pad(x, np.array(value, x.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
            return x[:, :, None, :, None]

        rows, columns = np.arange(strides) + strides * row, np.arange(strides) + strides * column
        codes = np.where((rows[:, None] < window) & (columns < window), rows[:, None] * window + columns, 255).astype(np.uint8)
        here = shifted(index, kernels.NONE) == codes[None, None, :, None, :, None]
        total = total + jnp.where(here, shifted(gradient, 0), 0)
    batch, channels = len(gradient), gradient.shape[-1]
    return total.reshape(batch, *(count * strides for count in blocks), channels)[:, : sizes[0], : sizes[1]]


_indexed_max_pool.defvjp(_max_and_index, _unpool)


def average_pool(x_NHWC: jax.Array, window: int, strides: int) -> jax.Array:
    """Mean over square windows, ceil mode, as in cuda-convnet: a window over the edge is divided by the area inside."""
    padding = [(0, _overhang(size, window, strides)) for size in x_NHWC.shape[1:3]]
    sums = jax.lax.reduce_window(x_NHWC, np.zeros((), x_NHWC.dtype), jax.lax.add, (1, window, window, 1),
                                 (1, strides, strides, 1), [(0, 0), *padding, (0, 0)])
    inside = [np.minimum(window, size - strides * np.arange(count))
              for size, count in zip(x_NHWC.shape[1:3], sums.shape[1:3], strict=True)]
    return sums / np.outer(*inside)[None, :, :, None].astype(x_NHWC.dtype)


def _overhang(size: int, window: int, strides: int) -> int:
    """How far the last window reaches over the edge in ceil mode; negative: how far before it the last one ends."""
    over = -(size - window) % strides
    return over if over < window else over - strides


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales up the rest; no key (evaluation) leaves x as it is.

    The mask is drawn for the logical array, so it is the same on every mesh.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
