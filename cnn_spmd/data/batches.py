"""Batches: a pure function of (seed, step), whatever the mesh and the number of processes.

The host chooses which examples a step sees; the devices, which hold the whole data set or are given a call's examples
(feed.py), gather, crop and flip them inside the jitted step. Shapes: N examples of the data set, B batch, S steps, H height,
W width, C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SAMPLE_BYTES, CHUNK_BYTES = 2**30, 2**18  # of images that statistics are taken from, in all and at a time (in a cache)


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of the examples in one epoch; int32 [N]."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples).astype(np.int32)


def train_indices(seed: int, step: int, steps: int, batch_size: int, examples: int, held_out: int = 0,
                  held_out_steps: int = 0) -> np.ndarray:
    """Which examples the `steps` steps from `step` on see; int32 [S, B].

    Each epoch is a new permutation of the data set; the rest that does not fill a batch is left out of that epoch.
    held_out: the last so many examples are not in the data set of the first `held_out_steps` steps; after these, an epoch of
    the whole begins.
    """
    def one(step):
        begin, size = (0, examples - held_out) if step < held_out_steps else (held_out_steps, examples)
        epoch, at = divmod(step - begin, size // batch_size)
        return _epoch_order(seed, begin + epoch, size)[at * batch_size:(at + 1) * batch_size]
    return np.stack([one(s) for s in range(step, step + steps)])


def eval_indices(batch_size: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Every example once, in order: indices int32 [S, B] and a mask bool [S, B] that is False on the padding."""
    steps = -(-examples // batch_size)
    flat = np.arange(steps * batch_size, dtype=np.int32)
    return np.minimum(flat, examples - 1).reshape(steps, batch_size), (flat < examples).reshape(steps, batch_size)


def crop_and_flip(images_NHWC: jax.Array, indices_B: jax.Array | None, key: jax.Array, *, side: int = 0, pad: int,
                  flip: bool) -> jax.Array:
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
    if indices_B is None:  # as a map over the images, which XLA partitions along them: nothing moves
        return jax.vmap(lambda image_HWC, rows_H, columns_W: image_HWC[rows_H[:, None], columns_W])(
            images_NHWC, rows_BH, columns_BW)
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
    crops = [images_BHWC[:, top:top + high, left:left + wide] for top, left in [(down // 2, right // 2), *corners]]
    return jnp.stack(crops + [crop[:, :, ::-1] for crop in crops] if mirror and views != "one" else crops, 1)


def normalise(images_BHWC: jax.Array, mean: jax.Array, std: jax.Array | float) -> jax.Array:
    """uint8 pixels less `mean`, a channel's or a pixel's, over `std`; float32."""
    return (images_BHWC.astype(jnp.float32) - mean) / std


def sample(images_NHWC: np.ndarray) -> np.ndarray:
    """The images that statistics of a training set are taken from: all, or SAMPLE_BYTES of them, evenly spaced."""
    every = -(-images_NHWC.nbytes // SAMPLE_BYTES)
    return images_NHWC[::every] if every > 1 else images_NHWC


def mean_image(images_NHWC: np.ndarray, side: int) -> np.ndarray:
    """The mean of the images, in pixels, and of it the centre of `side` pixels (0: all of it); float32 [side, side, C]."""
    mean_HWC = images_NHWC.mean(0, dtype=np.float64).astype(np.float32)
    top, left = ((size - (side or size)) // 2 for size in mean_HWC.shape[:2])
    return mean_HWC[top:top + side, left:left + side] if side else mean_HWC


def channel_statistics(images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation a channel of uint8 images, exact from their histograms; float32 [C] each, in pixels."""
    values = np.arange(256)
    counts_CV = sum(np.stack([np.bincount(chunk[..., c].ravel(), minlength=256) for c in range(chunk.shape[-1])])
                    for chunk in _chunks(images_NHWC))
    total = counts_CV.sum(1)
    mean_C = counts_CV @ values / total
    std_C = np.sqrt(np.maximum(counts_CV @ values**2 / total - mean_C**2, 1.0))
    return mean_C.astype(np.float32), std_C.astype(np.float32)


def colour_axes(images_NHWC: np.ndarray) -> np.ndarray:
    """The principal axes of the pixels' colours, as rows as long as the standard deviation along each; float32 [C, C].

    Eigenvectors of the covariance of all pixels; of an axis's two directions, the one whose largest component is positive.
    """
    channels, sums = images_NHWC.shape[-1], 0.0
    for chunk in _chunks(images_NHWC):
        pixels = np.ones((chunk.size // channels, channels + 1))  # the last column: then a product holds the sums, too
        pixels[:, :channels] = chunk.reshape(-1, channels)
        sums = sums + pixels.T @ pixels
    sums = sums / sums[-1, -1]
    variances_C, vectors = np.linalg.eigh(sums[:-1, :-1] - np.outer(sums[-1, :-1], sums[-1, :-1]))
    axes_CC = np.sqrt(np.maximum(variances_C, 0))[:, None] * vectors.T
    largest_C = np.take_along_axis(axes_CC, np.abs(axes_CC).argmax(1)[:, None], 1)
    return (axes_CC * np.where(largest_C < 0, -1, 1)).astype(np.float32)


def _chunks(images_NHWC: np.ndarray) -> list[np.ndarray]:
    """The images in parts, so that wider numbers made of them fit into memory."""
    return np.array_split(images_NHWC, -(-images_NHWC.nbytes // CHUNK_BYTES))
