"""Batches: a pure function of (seed, step), whatever the mesh and the number of processes.

The host chooses which examples a step sees; the devices, which hold the whole data set, gather, crop and flip them
inside the jitted step. Shapes: N examples of the data set, B batch, S steps, H height, W width, C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of the examples in one epoch; int32 [N]."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples).astype(np.int32)


def train_indices(seed: int, step: int, steps: int, batch_size: int, examples: int) -> np.ndarray:
    """Which examples the `steps` steps from `step` on see; int32 [S, B].

    Each epoch is a new permutation of the data set; the rest that does not fill a batch is left out of that epoch.
    """
    steps_per_epoch = examples // batch_size
    def one(step):
        epoch, at = divmod(step, steps_per_epoch)
        return _epoch_order(seed, epoch, examples)[at * batch_size:(at + 1) * batch_size]
    return np.stack([one(s) for s in range(step, step + steps)])


def eval_indices(batch_size: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Every example once, in order: indices int32 [S, B] and a mask bool [S, B] that is False on the padding."""
    steps = -(-examples // batch_size)
    flat = np.arange(steps * batch_size, dtype=np.int32)
    return np.minimum(flat, examples - 1).reshape(steps, batch_size), (flat < examples).reshape(steps, batch_size)


def crop_and_flip(images_NHWC: jax.Array, indices_B: jax.Array, key: jax.Array, *, pad: int, flip: bool) -> jax.Array:
    """Gathers images_NHWC[indices_B], each under a random crop of the reflection-padded image and a random mirroring.

    pad: pixels of reflection on each side (the crop keeps H and W); flip: mirror half of the images.
    Returns [B, H, W, C] of the input's dtype, in one gather: the padded image never exists in memory.
    """
    height, width = images_NHWC.shape[1:3]
    batch = len(indices_B)
    crop_key, flip_key = jax.random.split(key)
    shift_B2 = jax.random.randint(crop_key, (batch, 2), -pad, pad + 1)
    rows_BH = _reflect(jnp.arange(height) + shift_B2[:, :1], height)
    columns_BW = _reflect(jnp.arange(width) + shift_B2[:, 1:], width)
    if flip:
        mirrored_B1 = jax.random.bernoulli(flip_key, 0.5, (batch, 1))
        columns_BW = jnp.where(mirrored_B1, width - 1 - columns_BW, columns_BW)
    return images_NHWC[indices_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def _reflect(position: jax.Array, size: int) -> jax.Array:
    """Folds positions in [-(size-1), 2(size-1)] back into [0, size): the edge pixel is not repeated."""
    return (size - 1) - abs((size - 1) - abs(position))


def normalise(images_BHWC: jax.Array, mean_C: jax.Array, std_C: jax.Array) -> jax.Array:
    """uint8 pixels to float32 of zero mean and unit standard deviation a channel (of the training set, in pixels)."""
    return (images_BHWC.astype(jnp.float32) - mean_C) / std_C


def channel_statistics(images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation a channel of uint8 images, exact from their histograms; float32 [C] each, in pixels."""
    values = np.arange(256)
    counts_CV = np.stack([np.bincount(images_NHWC[..., c].ravel(), minlength=256) for c in range(images_NHWC.shape[-1])])
    total = counts_CV.sum(1)
    mean_C = counts_CV @ values / total
    std_C = np.sqrt(np.maximum(counts_CV @ values**2 / total - mean_C**2, 1.0))
    return mean_C.astype(np.float32), std_C.astype(np.float32)
