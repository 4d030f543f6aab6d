"""Convolutions, in the forms that GPUs and XLA's partitioner do well.

A layer's input is placed as its kernel's rows are, its output as its kernel's columns are.

Shapes: N batch, H height, W width, C channels; a kernel is HWIO, I channels in and O out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnn_spmd.layers.common import HE, LEVERS
from cnn_spmd.layers.pool import bias_relu, max_pool


def products(layer: nnx.Conv, x_NHWC: jax.Array, levers, split: bool, spread: bool) -> jax.Array:
    """The convolution `layer` without its bias; the map may be followed by columns that mean nothing.

    "space_to_depth": one with stride s is one of stride 1 over s x s pixels as channels, with zeros in the kernel's last
    rows and columns where s does not divide the window; AlexNet's 11x11 on 3 channels, which GPUs do badly, is 3x3 on 48.
    "column_groups": several columns of the map at a time as channels. Over s x 2s pixels, two: 3x2 on 96, and 128 wide
    instead of 64; of images at stride 1, eight; both only with "space_to_depth", in one. And two for the gradient by an
    input of up to 64 maps of odd width. Not where the channels are `split` over devices; nor the eight where the batch is
    `spread`: the gradient that is then summed over devices is that of the larger kernel, many times a small window's.
    """
    x_NHWC, kernel_HWIO = x_NHWC.astype(layer.dtype), layer.kernel[...].astype(layer.dtype)
    padding, (stride, _), (window, _, channels, columns) = (
        layer.padding,
        layer.strides,
        kernel_HWIO.shape,
    )
    images, by_columns = channels <= 3, "column_groups" in levers and not split
    if stride == 1 and by_columns and not images and channels <= 64 and x_NHWC.shape[2] % 2:
        return paired_gradient(x_NHWC, kernel_HWIO, tuple(padding[0]))
    if "space_to_depth" not in levers or (
        stride == 1 and not (by_columns and images and not spread)
    ):
        return convolve(x_NHWC, kernel_HWIO, padding, (stride, stride))
    many, zero = (8 if stride == 1 else 2) if by_columns else 1, np.zeros((), x_NHWC.dtype)
    steps = (stride, many * stride)  # of a block of pixels, down and right
    blocks = [-(-(window + step - stride) // step) for step in steps]
    out = [
        (size + sum(pads) - window) // stride + 1
        for size, pads in zip(x_NHWC.shape[1:3], padding, strict=True)
    ]
    widths = [
        (low, (-(-count * stride // step) + block - 1) * step - size - low, 0)
        for size, (low, _), count, step, block in zip(
            x_NHWC.shape[1:3], padding, out, steps, blocks, strict=True
        )
    ]
    x_NHWC = jax.lax.pad(x_NHWC, zero, [(0, 0, 0), *widths, (0, 0, 0)])
    batch, height, width = (
        size // part for size, part in zip(x_NHWC.shape, (1, *steps), strict=False)
    )
    x_NHWC = x_NHWC.reshape(batch, height, steps[0], width, steps[1], channels).transpose(
        0, 1, 3, 2, 4, 5
    )
    rows, across = (block * step - window for block, step in zip(blocks, steps, strict=True))
    kernel = jnp.stack(
        [
            jax.lax.pad(
                kernel_HWIO, zero, [(0, rows, 0), (shift, across - shift, 0), (0, 0, 0), (0, 0, 0)]
            )
            for shift in range(0, steps[1], stride)
        ],
        axis=3,
    )
    kernel = kernel.reshape(
        blocks[0], steps[0], blocks[1], steps[1], channels, many * columns
    ).transpose(0, 2, 1, 3, 4, 5)
    x_NHWC = convolve(
        x_NHWC.reshape(batch, height, width, -1),
        kernel.reshape(*blocks, -1, many * columns),
        "VALID",
    )
    return x_NHWC.reshape(batch, out[0], -1, columns)


def convolve(
    x_NHWC: jax.Array, kernel_HWIO: jax.Array, padding, strides: tuple[int, int] = (1, 1)
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_NHWC, kernel_HWIO, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def paired_gradient(
    x_NHWC: jax.Array, kernel_HWIO: jax.Array, padding: tuple[int, int]
) -> jax.Array:
    """A convolution of stride 1 over maps of odd width, whose gradient by a narrow x is made two columns at a time.

    An odd width, since cuDNN pads both sides alike.
    """
    return convolve(x_NHWC, kernel_HWIO, [padding] * 2)


def _gradient_in_pairs(padding, kept, gradient_NHWO):
    x_NHWC, kernel_HWIO = kept
    _, by_kernel = jax.vjp(
        lambda kernel_HWIO: convolve(x_NHWC, kernel_HWIO, [padding] * 2), kernel_HWIO
    )
    (batch, height, _, channels), window, zero = (
        x_NHWC.shape,
        len(kernel_HWIO),
        np.zeros((), x_NHWC.dtype),
    )
    turned_HWOI = kernel_HWIO[::-1, ::-1].transpose(0, 1, 3, 2)
    pair = jnp.stack(
        [
            jax.lax.pad(turned_HWOI, zero, [(0, 0, 0), (shift, 1 - shift, 0), (0, 0, 0), (0, 0, 0)])
            for shift in range(2)
        ],
        axis=3,
    )
    low, high = (window - 1 - pad for pad in padding)
    by_x = convolve(
        gradient_NHWO,
        pair.reshape(window, window + 1, -1, 2 * channels),
        [(low, high), (low + 1, high + 1)],
        (1, 2),
    )  # the first pair starts a column before the map
    return by_x.reshape(batch, height, -1, channels)[:, :, 1:], *by_kernel(gradient_NHWO)


paired_gradient.defvjp(
    lambda x, kernel, padding: (paired_gradient(x, kernel, padding), (x, kernel)),
    _gradient_in_pairs,
)


def grouped(name: str, layer: nnx.Conv, x_NHWC: jax.Array, place) -> jax.Array:
    """A grouped convolution without its bias, as one a group: XLA partitions a grouped one by gathering the whole batch."""
    inputs, outputs = (
        ("conv_batch", None, None, "group_in"),
        ("conv_batch", None, None, "group_out"),
    )

    def of_a_device(
        part, x_NHWC, kernel_HWIO
    ):  # the columns that this device holds: some groups, or a part of one
        rows, columns = kernel_HWIO.shape[2:]
        of_a_group = layer.out_features // layer.feature_group_count
        groups = max(1, columns // of_a_group)
        if x_NHWC.shape[-1] > groups * rows:  # all channels are here
            x_NHWC = jax.lax.dynamic_slice_in_dim(
                x_NHWC, part * columns // of_a_group * rows, groups * rows, -1
            )
        parts = zip(jnp.split(x_NHWC, groups, -1), jnp.split(kernel_HWIO, groups, -1), strict=True)
        return jnp.concatenate([convolve(x, kernel, layer.padding) for x, kernel in parts], -1)

    x_NHWC = place(x_NHWC, *inputs, name=f"{name} input")
    kernel = layer.kernel[...].astype(layer.dtype)
    return place.towers(
        of_a_device,
        layer.feature_group_count,
        (x_NHWC, inputs),
        (kernel, layer.kernel.axes),
        out=outputs,
        name=name,
    )


def conv(
    channels_in: int,
    channels_out: int,
    window: int,
    *,
    strides: int = 1,
    padding: tuple[int, int] | None = None,
    groups: int = 1,
    dtype,
    rngs,
    kernel_init=HE,
    bias_init=nnx.initializers.zeros,
) -> nnx.Conv:
    """A square 2-D convolution, NHWC by HWIO, with bias; float32 parameters, computed in `dtype`.

    padding: zeros before and after, in both directions; None keeps the size of what stride 1 goes over.

    groups > 1: the channels fall into towers that do not see each other (AlexNet 2012, figure 2); stride 1, SAME.
    """
    rows, columns = ("conv_in", "conv_out") if groups == 1 else (None, "group_out")
    padding = [((window - 1) // 2, window // 2) if padding is None else padding] * 2
    return nnx.Conv(
        channels_in,
        channels_out,
        (window, window),
        (strides, strides),
        padding=padding,
        feature_group_count=groups,
        dtype=dtype,
        kernel_init=kernel_init,
        kernel_metadata={"axes": (None, None, rows, columns)},
        bias_init=bias_init,
        bias_metadata={"axes": (columns,)},
        rngs=rngs,
    )


def conv_relu(
    name: str,
    layer: nnx.Conv,
    x_NHWC: jax.Array,
    place,
    levers=LEVERS,
    pool: dict | None = None,
    activation=nnx.relu,
) -> jax.Array:
    """The convolution `layer`, called `name`, its bias, its activation and, with `pool`, a max pool of these settings.

    Bias and ReLU grow with their argument and are the same everywhere in a map, so they change places with the pool to the
    last bit ("pool_first"): they, and the sum that is the bias's gradient, then go over a quarter of the numbers.
    """
    group = layer.feature_group_count > 1
    axes = ("conv_batch", None, None, "group_out" if group else "conv_out")
    if group:
        x_NHWC = grouped(name, layer, x_NHWC, place)
    else:
        x_NHWC = place(x_NHWC, "conv_batch", None, None, "conv_in", name=f"{name} input")
        width = (x_NHWC.shape[2] + sum(layer.padding[1]) - layer.kernel_size[1]) // layer.strides[
            1
        ] + 1
        x_NHWC = products(
            layer, x_NHWC, levers, place.shards("conv_out") > 1, place.shards("conv_batch") > 1
        )
        more = (
            x_NHWC.shape[2] - width
        )  # columns, that the pool may leave out anyway (but a report has the map's shape)
        if (
            place.record
            or not pool
            or pool.get("ceil")
            or (width - pool["window"]) % pool["strides"] + more >= pool["strides"]
        ):
            x_NHWC = x_NHWC[:, :, :width]
    x_NHWC, bias_C = (
        place(x_NHWC, *axes, name=f"{name} output"),
        layer.bias[...].astype(x_NHWC.dtype),
    )
    if pool and "pool_first" in levers and activation is nnx.relu:
        return max_pool(
            x_NHWC, **pool, place=place, channels=axes[-1], levers=levers, bias_C=bias_C
        )
    own = activation is nnx.relu and "own_gradients" in levers
    x_NHWC = place(bias_relu(x_NHWC, bias_C) if own else activation(x_NHWC + bias_C), *axes)
    return (
        max_pool(x_NHWC, **pool, place=place, channels=axes[-1], levers=levers) if pool else x_NHWC
    )
