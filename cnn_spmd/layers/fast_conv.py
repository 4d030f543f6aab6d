"""Compute convolutions in forms that GPUs do faster than a plain convolution.

"space_to_depth" makes blocks of pixels channels; "column_groups" computes several columns of the
map at a time. Each form gives the numbers of layers/common.py's `convolve` up to rounding.

Shapes: N batch, H height, W width, C channels. A kernel is HWIO: I channels in, O channels out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnn_spmd.layers.common import convolve

IMAGE_CHANNELS = 3

# Columns of the map that one product computes. A convolution of images has few output channels
# (AlexNet: 64); two columns with stride, or eight without, make products wide enough for a GPU.
COLUMNS_STRIDED = 2
COLUMNS_OF_IMAGES = 8

# The same for maps of few channels, at most FEW, such as the first ones of ResNets for CIFAR-10.
COLUMNS_OF_MAPS = 4
FEW = 16

# Up to this many input channels, the gradient by the input is too narrow for a GPU by itself.
NARROW = 64


def convolve_fast(
    x_NHWC: jax.Array, kernel_HWIO: jax.Array, padding: list, stride: int, fast_forms, place
) -> jax.Array:
    """Convolve in the fastest form that the shapes, `fast_forms` and the placement allow.

    Without fast_forms it is common.convolve. padding: [(low, high), (low, high)].

    Returns [N, H', W' + extra, O]. The `extra` columns at the right, often 0, have no meaning.
    """
    channels, strides = kernel_HWIO.shape[2], (stride, stride)
    # Several columns as channels would mix with channels that the placement splits over devices.
    columns = "column_groups" in fast_forms and not place.splits("conv_out")
    if channels > IMAGE_CHANNELS:
        if columns and stride == 1 and channels <= FEW and not place.splits("conv_batch"):
            return space_to_depth(x_NHWC, kernel_HWIO, padding, stride, COLUMNS_OF_MAPS)
        if columns and stride == 1 and channels <= NARROW and x_NHWC.shape[2] % 2:
            return paired_gradient(x_NHWC, kernel_HWIO, tuple(padding[0]))
        return convolve(x_NHWC, kernel_HWIO, padding, strides)
    if "space_to_depth" not in fast_forms:
        return convolve(x_NHWC, kernel_HWIO, padding, strides)
    if stride > 1:
        group = COLUMNS_STRIDED if columns else 1
        return space_to_depth(x_NHWC, kernel_HWIO, padding, stride, group)
    # Devices that share the batch sum the gradient of the larger kernel, which is many times that
    # of a small window: then the plain form is faster.
    if columns and not place.splits("conv_batch"):
        return space_to_depth(x_NHWC, kernel_HWIO, padding, stride, COLUMNS_OF_IMAGES)
    return convolve(x_NHWC, kernel_HWIO, padding, strides)


def pool_ignores_extra(columns: int, width: int, pool: dict | None) -> bool:
    """Return whether a max pool over `columns` columns reads only the first `width`.

    pool: settings of pool.max_pool. If so, the columns beyond `width` need not be cut off first.
    """
    if not pool or pool.get("ceil"):
        return False
    unread = (width - pool["window"]) % pool["strides"]  # columns after the last window
    return unread + (columns - width) < pool["strides"]


def space_to_depth(
    x_NHWC: jax.Array, kernel_HWIO: jax.Array, padding: list, stride: int, group: int
) -> jax.Array:
    """Convolve blocks of pixels as channels, with stride 1.

    A block is stride x (group * stride) pixels, and one product computes `group` columns of the
    map. Zeros fill the larger kernel where the blocks do not divide the window.

    GPUs are fast if many channels go in and out. AlexNet's conv1, an 11x11 window on 3 channels
    with stride 4, becomes 3x3 on 48 channels with group=1. With group=2 it is 3x2 on 96 channels,
    and 128 channels come out instead of 64. Applies to images, with strides or without (group=8).

    Returns [N, H', W' + extra, O]; `extra` is what rounds W' up to a multiple of `group`.
    """
    window, channels_out = kernel_HWIO.shape[0], kernel_HWIO.shape[3]
    block = (stride, group * stride)
    # Blocks that one window covers, down and right.
    blocks = [-(-(window + step - stride) // step) for step in block]
    height = (x_NHWC.shape[1] + sum(padding[0]) - window) // stride + 1
    x_blocks = _blocks_of_image(x_NHWC, padding, window, stride, block, blocks)
    kernel_blocks = _blocks_of_kernel(kernel_HWIO, stride, block, blocks)
    x_NHWC = convolve(
        x_blocks.reshape(*x_blocks.shape[:3], -1),
        kernel_blocks.reshape(*blocks, -1, group * channels_out),
        "VALID",
    )
    return x_NHWC.reshape(len(x_NHWC), height, -1, channels_out)


def _blocks_of_image(x_NHWC, padding, window, stride, block, blocks) -> jax.Array:
    """Cut padded images into blocks: [N, rows, columns, *block, C]."""
    batch, *sizes, channels = x_NHWC.shape
    counts, widths = [], []
    for size, (low, high), step, covered in zip(sizes, padding, block, blocks, strict=True):
        pixels_out = (size + low + high - window) // stride + 1
        count = -(-pixels_out * stride // step) + covered - 1
        counts.append(count)
        widths.append((low, count * step - size - low, 0))
    zero = np.zeros((), x_NHWC.dtype)
    x_NHWC = jax.lax.pad(x_NHWC, zero, [(0, 0, 0), *widths, (0, 0, 0)])
    (rows, columns), (down, right) = counts, block
    x = x_NHWC.reshape(batch, rows, down, columns, right, channels)
    return x.transpose(0, 1, 3, 2, 4, 5)


def _blocks_of_kernel(kernel_HWIO, stride, block, blocks) -> jax.Array:
    """Cut a kernel into blocks for each column: [*blocks, *block, I, group * O]."""
    window, _, channels_in, channels_out = kernel_HWIO.shape
    rows, columns = (count * step - window for count, step in zip(blocks, block, strict=True))
    shifted = [
        _pad_kernel(kernel_HWIO, rows=(0, rows), columns=(shift, columns - shift))
        for shift in range(0, block[1], stride)
    ]
    kernel = jnp.stack(shifted, axis=3)
    kernel = kernel.reshape(
        blocks[0], block[0], blocks[1], block[1], channels_in, len(shifted) * channels_out
    )
    return kernel.transpose(0, 2, 1, 3, 4, 5)


def _pad_kernel(kernel_HWIO, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    """Put zeros before and after a kernel's rows and columns; negative numbers cut it."""
    zero = np.zeros((), kernel_HWIO.dtype)
    return jax.lax.pad(kernel_HWIO, zero, [(*rows, 0), (*columns, 0), (0, 0, 0), (0, 0, 0)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def paired_gradient(
    x_NHWC: jax.Array, kernel_HWIO: jax.Array, padding: tuple[int, int]
) -> jax.Array:
    """Convolve with stride 1; compute the gradient by x two columns at a time.

    That gradient has as many channels as x. If they are few, two columns make a product that is
    twice as wide. Applies to maps of odd width: cuDNN pads both sides alike, and the pairs need one
    column more at the right.
    """
    return convolve(x_NHWC, kernel_HWIO, [padding] * 2)


def _paired_forward(x_NHWC, kernel_HWIO, padding):
    return paired_gradient(x_NHWC, kernel_HWIO, padding), (x_NHWC, kernel_HWIO)


def _paired_backward(padding, kept, gradient_NHWO):
    x_NHWC, kernel_HWIO = kept
    _, by_kernel = jax.vjp(
        lambda kernel_HWIO: convolve(x_NHWC, kernel_HWIO, [padding] * 2), kernel_HWIO
    )
    (batch, height, _, channels), window = x_NHWC.shape, len(kernel_HWIO)
    # The gradient by x is a convolution with the kernel turned around.
    turned_HWOI = kernel_HWIO[::-1, ::-1].transpose(0, 1, 3, 2)
    shifted = [_pad_kernel(turned_HWOI, (0, 0), (shift, 1 - shift)) for shift in range(2)]
    pair_HWOI = jnp.stack(shifted, axis=3).reshape(window, window + 1, -1, 2 * channels)
    low, high = (window - 1 - pad for pad in padding)
    # The first pair starts one column before the map; that column is cut off afterwards.
    pairs = convolve(gradient_NHWO, pair_HWOI, [(low, high), (low + 1, high + 1)], (1, 2))
    by_x = pairs.reshape(batch, height, -1, channels)[:, :, 1:]
    return by_x, *by_kernel(gradient_NHWO)


paired_gradient.defvjp(_paired_forward, _paired_backward)
