"""Crops, flips, colour noise and test views, made on the devices inside the jitted step.

Shapes: N examples of the data set, B batch, V views, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np


def crop_and_flip(
    images_NHWC: jax.Array,
    indices_B: jax.Array | None,
    key: jax.Array,
    *,
    side: int = 0,
    pad: int,
    flip: bool,
) -> jax.Array:
    """Gathers images_NHWC[indices_B], each under a random crop of the reflection-padded image and a random mirroring.

    indices_B: None takes the images as they come, each where it is; side: of the crop, 0 keeps H and W; pad: pixels of
    reflection on each side; flip: mirror half of the images.
    Returns [B, side, side, C] of the input's dtype, in one gather: the padded image never exists in memory.
    """
    height, width = images_NHWC.shape[1:3]
    high, wide = side or height, side or width
    batch = len(images_NHWC if indices_B is None else indices_B)
    crop_key, flip_key = jax.random.split(key)
    room = np.array([height - high, width - wide])
    shift_B2 = jax.random.randint(crop_key, (batch, 2), -pad, room + pad + 1)
    rows_BH = _reflect(jnp.arange(high) + shift_B2[:, :1], height)
    columns_BW = _reflect(jnp.arange(wide) + shift_B2[:, 1:], width)
    if flip:
        mirrored_B1 = jax.random.bernoulli(flip_key, 0.5, (batch, 1))
        columns_BW = jnp.where(mirrored_B1, width - 1 - columns_BW, columns_BW)
    if (
        indices_B is None
    ):  # as a map over the images, which XLA partitions along them: nothing moves
        return jax.vmap(lambda image_HWC, rows_H, columns_W: image_HWC[rows_H[:, None], columns_W])(
            images_NHWC, rows_BH, columns_BW
        )
    return images_NHWC[indices_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def _reflect(position: jax.Array, size: int) -> jax.Array:
    """Folds positions in [-(size-1), 2(size-1)] back into [0, size): the edge pixel is not repeated."""
    return (size - 1) - abs((size - 1) - abs(position))


def colour_noise(key: jax.Array, batch: int, axes_CC: jax.Array) -> jax.Array:
    """What is added to all pixels of each image, along the principal axes of colour; float32 [B, C], in pixels.

    Krizhevsky et al. 2012, section 4.1: alpha times the eigenvalue along each eigenvector of the covariance of RGB values.
    A variance added to values would hang on their unit; the authors' code (cuda-convnet2, convdata.py) takes the standard
    deviation, as here. axes_CC: colour_axes times the standard deviation of alpha, .1 in the paper.
    """
    return (jax.random.normal(key, (batch, len(axes_CC), 1)) * axes_CC).sum(1)


def eval_views(images_BHWC: jax.Array, side: int, views: str, mirror: bool) -> jax.Array:
    """The crops of `side` pixels (0: H and W) that a test image is seen in; [B, V, side, side, C].

    "one": the centre; "mirrored": the centre and its mirror; "ten": the centre and the four corners, and their mirrors
    (Krizhevsky et al. 2012, section 4.1). mirror=False: a mirrored image would be another class, so there are none.
    """
    height, width = images_BHWC.shape[1:3]
    high, wide = side or height, side or width
    down, right = height - high, width - wide
    corners = [(0, 0), (0, right), (down, 0), (down, right)] if views == "ten" else []
    crops = [
        images_BHWC[:, top : top + high, left : left + wide]
        for top, left in [(down // 2, right // 2), *corners]
    ]
    return jnp.stack(
        crops + [crop[:, :, ::-1] for crop in crops] if mirror and views != "one" else crops, 1
    )


def normalise(images_BHWC: jax.Array, mean: jax.Array, std: jax.Array | float) -> jax.Array:
    """uint8 pixels less `mean`, a channel's or a pixel's, over `std`; float32."""
    return (images_BHWC.astype(jnp.float32) - mean) / std
