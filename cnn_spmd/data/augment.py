"""Turn uint8 images into what the network sees, inside the jitted step.

Training images are cropped, mirrored and given colour noise at random. Test images are cut into
views. Both are normalised.

Shapes: N examples of the data set, B batch, V views, H height, W width, C channels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The settings that make images ready for the network.

    crop: the side of what the network sees, in pixels; 0 takes the whole image.
    """

    mean: Any  # [C] or [H, W, C], over the training set, in pixels
    std: Any  # [C] or [], in pixels
    crop: int
    crop_pad: int  # pixels of reflection around a training image
    flip: bool  # mirror half of the training images
    colour_CC: Any  # principal axes of colour, scaled, in pixels; None: no colour noise
    views: str  # of a test image: "one", "mirrored" or "ten"
    mirror: bool  # whether a mirrored test image keeps its class

    def train_images(
        self,
        images_NHWC: jax.Array,
        indices_B: jax.Array | None,
        crop_key: jax.Array,
        colour_key: jax.Array,
    ) -> jax.Array:
        """Return augmented training images, float32 [B, crop, crop, C].

        indices_B: the examples to take; None takes `images_NHWC` as they are.
        """
        images = crop_and_flip(
            images_NHWC, indices_B, crop_key, side=self.crop, pad=self.crop_pad, flip=self.flip
        )
        if self.colour_CC is not None:
            noise_BC = colour_noise(colour_key, len(images), self.colour_CC)
            images = images + noise_BC[:, None, None]
        return normalise(images, self.mean, self.std)

    def test_views(self, images_BHWC: jax.Array) -> jax.Array:
        """Return the views of test images, float32 [B, V, crop, crop, C]."""
        views = eval_views(images_BHWC, self.crop, self.views, self.mirror)
        return normalise(views, self.mean, self.std)


def views_taken(views: str, mirror: bool) -> str:
    """Name the views that eval_views takes: "five" are the crops of "ten" without their mirrors."""
    return views if mirror else {"ten": "five"}.get(views, "one")


def crop_and_flip(
    images_NHWC: jax.Array,
    indices_B: jax.Array | None,
    key: jax.Array,
    *,
    side: int = 0,
    pad: int,
    flip: bool,
) -> jax.Array:
    """Return images_NHWC[indices_B], each cropped and mirrored at random.

    indices_B: None takes the images as they come. side: of the crop; 0 keeps H and W. pad: pixels
    of reflection on each side, from which the crop may take. flip: mirror half of the images.
    Returns [B, side, side, C] of the input's dtype, in one gather: the padded image never exists in
    memory.
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
    if indices_B is None:  # a map over the images: XLA splits it along the batch, nothing moves
        return jax.vmap(lambda image_HWC, rows_H, columns_W: image_HWC[rows_H[:, None], columns_W])(
            images_NHWC, rows_BH, columns_BW
        )
    return images_NHWC[indices_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def _reflect(position: jax.Array, size: int) -> jax.Array:
    """Fold positions in [-(size-1), 2(size-1)] into [0, size) by reflection.

    The edge pixel is not repeated.
    """
    return (size - 1) - abs((size - 1) - abs(position))


def colour_noise(key: jax.Array, batch: int, axes_CC: jax.Array) -> jax.Array:
    """Return what is added to all pixels of each image, float32 [B, C], in pixels.

    axes_CC: the principal axes of colour, times the standard deviation of alpha (0.1 in the paper).
    Krizhevsky et al. 2012, section 4.1: alpha times the eigenvalue along each eigenvector of the
    covariance of RGB values. A variance added to values would depend on their unit; the authors'
    code (cuda-convnet2, convdata.py) takes the standard deviation, and so does this.
    """
    return (jax.random.normal(key, (batch, len(axes_CC), 1)) * axes_CC).sum(1)


def eval_views(images_BHWC: jax.Array, side: int, views: str, mirror: bool) -> jax.Array:
    """Return the crops in which a test image is seen, [B, V, side, side, C].

    side: of a crop, in pixels; 0 keeps H and W. views: "one" is the centre; "mirrored" the centre
    and its mirror; "ten" the centre, the four corners, and their mirrors (Krizhevsky et al. 2012,
    section 4.1). mirror=False leaves the mirrors out: a mirrored image would be another class.
    """
    height, width = images_BHWC.shape[1:3]
    high, wide = side or height, side or width
    down, right = height - high, width - wide
    corners = [(0, 0), (0, right), (down, 0), (down, right)] if views == "ten" else []
    crops = [
        images_BHWC[:, top : top + high, left : left + wide]
        for top, left in [(down // 2, right // 2), *corners]
    ]
    if mirror and views != "one":
        crops += [crop[:, :, ::-1] for crop in crops]
    return jnp.stack(crops, 1)


def normalise(images: jax.Array, mean: jax.Array, std: jax.Array | float) -> jax.Array:
    """Return (images - mean) / std of uint8 pixels [..., H, W, C], as float32."""
    return (images.astype(jnp.float32) - mean) / std
