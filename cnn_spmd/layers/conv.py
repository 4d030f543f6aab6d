"""Build a convolution, and apply it with its bias, activation and pool.

A layer's input is placed as the rows of its kernel are, its output as the columns are.

Shapes: N batch, H height, W width, C channels. A kernel is HWIO: I channels in, O channels out.
"""

from collections.abc import Callable

import jax
from flax import nnx

from cnn_spmd.layers import fast_conv
from cnn_spmd.layers.activation import activate
from cnn_spmd.layers.common import FAST_FORMS, HE
from cnn_spmd.layers.pool import max_pool
from cnn_spmd.sharding.halo import Windows


def conv(
    channels_in: int,
    channels_out: int,
    window: int,
    *,
    strides: int = 1,
    padding: tuple[int, int] | None = None,
    groups: int = 1,
    use_bias: bool = True,
    dtype,
    rngs: nnx.Rngs,
    kernel_init=HE,
    bias_init=nnx.initializers.zeros,
) -> nnx.Conv:
    """Build a square 2-D convolution with float32 parameters that computes in `dtype`.

    padding: zeros before and after, the same for height and width; None keeps the size at stride 1.

    groups: above 1, the channels form towers that do not see each other (AlexNet 2012, figure 2).
    """
    rows, columns = ("conv_in", "conv_out") if groups == 1 else ("tower_in", "group_out")
    return nnx.Conv(
        channels_in,
        channels_out,
        (window, window),
        (strides, strides),
        padding=[((window - 1) // 2, window // 2) if padding is None else padding] * 2,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        kernel_metadata={"axes": (None, None, rows, columns)},
        bias_init=bias_init,
        bias_metadata={"axes": (columns,)},
        rngs=rngs,
    )


def apply(name: str, layer: nnx.Conv, x_NHWC: jax.Array, place, fast_forms=FAST_FORMS) -> jax.Array:
    """Apply the convolution `layer` and its bias, without an activation."""
    return conv_relu(name, layer, x_NHWC, place, fast_forms, activation=lambda x: x)


def conv_relu(
    name: str,
    layer: nnx.Conv,
    x_NHWC: jax.Array,
    place,
    fast_forms=FAST_FORMS,
    pool: dict | None = None,
    activation: Callable = nnx.relu,
) -> jax.Array:
    """Apply a convolution, its bias, its activation and, with `pool`, a max pool.

    layer: from `conv`. name: the layer's, such as "conv1", for the placement report. place: a
    Placement or UNPLACED. fast_forms: the fast forms that may be used (layers/common.py). pool:
    settings of pool.max_pool.

    The fast form "pool_first" moves the bias and the ReLU behind the pool. Both grow with their
    argument and are the same everywhere in a map, so the result is the same to the last bit. They
    then work on a quarter of the numbers, and so does the sum that is the bias's gradient.
    """
    channels = "conv_out" if layer.feature_group_count == 1 else "group_out"
    if layer.feature_group_count > 1 or place.splits("image_height"):
        x_NHWC = _convolve_on_shards(name, layer, x_NHWC, place, fast_forms)
    else:
        x_NHWC = _convolve(name, layer, x_NHWC, place, fast_forms, pool)
    axes = place.map_axes(x_NHWC.shape[1], channels)
    x_NHWC = place(x_NHWC, *axes, name=f"{name} output")
    bias_C = None if layer.bias is None else layer.bias[...].astype(x_NHWC.dtype)

    pooling = dict(
        pool or {}, place=place, channels=channels, fast_forms=fast_forms, name=f"{name} pool"
    )
    swaps = activation is nnx.relu and bias_C is not None
    if pool and swaps and "pool_first" in fast_forms:
        return max_pool(x_NHWC, **pooling, bias_C=bias_C)
    x_NHWC = place(activate(x_NHWC, bias_C, activation, fast_forms), *axes)
    return max_pool(x_NHWC, **pooling) if pool else x_NHWC


def _convolve(name, layer, x_NHWC, place, fast_forms, pool) -> jax.Array:
    """Convolve without the bias; extra columns may remain that `pool` ignores."""
    x_NHWC = place(x_NHWC, "conv_batch", "image_height", None, "conv_in", name=f"{name} input")
    window, stride, padding = layer.kernel_size[1], layer.strides[1], layer.padding
    width = (x_NHWC.shape[2] + sum(padding[1]) - window) // stride + 1

    def product(x_NHWC, kernel_HWIO):
        return fast_conv.convolve_fast(x_NHWC, kernel_HWIO, padding, stride, fast_forms, place)

    x_NHWC = place.product(product, x_NHWC.astype(layer.dtype), layer.kernel, layer.dtype)
    # A placement report (place.record) shows each map with its true shape.
    if not place.record and fast_conv.pool_ignores_extra(x_NHWC.shape[2], width, pool):
        return x_NHWC
    return x_NHWC[:, :, :width]


def _convolve_on_shards(name, layer, x_NHWC, place, fast_forms) -> jax.Array:
    """Convolve without the bias: each device its own towers or rows.

    XLA partitions one grouped convolution by gathering the whole batch, so each tower is its own.
    Where the height is split, each device gets the rows that its windows read. The fast form
    "column_groups" does not apply here.
    """
    groups, padding = layer.feature_group_count, layer.padding
    window, stride, rows = layer.kernel_size[0], layer.strides[0], x_NHWC.shape[1]
    count = (rows + sum(padding[0]) - window) // stride + 1
    inputs = place.map_axes(count, "conv_in" if groups == 1 else "group_in")
    x_NHWC = place(x_NHWC, *inputs, name=f"{name} input").astype(layer.dtype)
    splits_rows = place.splits_height(inputs)
    if splits_rows:
        reach = Windows(rows, window, stride, padding[0][0], count)
        x_NHWC = place.overlapping(x_NHWC, inputs, reach, name)
        padding = [(0, 0), padding[1]]  # the halo holds the rows beyond the edge
    forms = tuple(form for form in fast_forms if form == "space_to_depth")

    def product(x_NHWC, kernel_HWIO):
        return place.towers(
            lambda x, kernel: fast_conv.convolve_fast(x, kernel, padding, stride, forms, place),
            groups,
            (x_NHWC, inputs),
            (kernel_HWIO, layer.kernel.axes),
            out=place.map_axes(count, layer.kernel.axes[-1]),
            name=name,
            rows=splits_rows,
        )

    return place.product(product, x_NHWC, layer.kernel, layer.dtype)[:, :count]
