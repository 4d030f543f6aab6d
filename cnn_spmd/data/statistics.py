"""Compute means, deviations and axes of colour of a training set's images.

Shapes: N images, H height, W width, C channels, V = 256 values of a pixel, P pixels.
"""

import concurrent.futures
import os

import numpy as np
from PIL import Image

# The most bytes of images that statistics are taken from.
SAMPLE_BYTES = 2**30
# The bytes of images that are worked on at a time, so that they stay in a CPU's cache.
BLOCK_BYTES = 2**18
VALUES_V = np.arange(256)


def sample(images_NHWC: np.ndarray) -> np.ndarray:
    """Return the images to take statistics from.

    These are all, or SAMPLE_BYTES of them, evenly spaced.
    """
    every = -(-images_NHWC.nbytes // SAMPLE_BYTES)
    return images_NHWC[::every] if every > 1 else images_NHWC


def mean_image(images_NHWC: np.ndarray, side: int) -> np.ndarray:
    """Return the central `side` x `side` pixels of the mean image; 0: all of it.

    The result is float32 [side, side, C], in pixel values of 0 to 255.
    """
    mean_HWC = images_NHWC.mean(0, dtype=np.float64).astype(np.float32)
    if not side:
        return mean_HWC
    height, width = mean_HWC.shape[:2]
    top = (height - side) // 2
    left = (width - side) // 2
    return mean_HWC[top : top + side, left : left + side]


def channel_statistics(images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation per channel; float32 [C] each.

    They are in pixel values, and exact, from the histograms of the uint8 images. A deviation is at
    least 1, so that dividing by it is safe.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        counts_CV = sum(pool.map(histograms, blocks(images_NHWC)))
    total_C = counts_CV.sum(1)
    mean_C = counts_CV @ VALUES_V / total_C
    variance_C = counts_CV @ VALUES_V**2 / total_C - mean_C**2
    std_C = np.sqrt(np.maximum(variance_C, 1.0))
    return mean_C.astype(np.float32), std_C.astype(np.float32)


def histograms(images_NHWC: np.ndarray) -> np.ndarray:
    """Count each value in each channel of RGB images; int [C, V]."""
    # Pillow counts faster than NumPy, and without Python's lock.
    image = Image.fromarray(images_NHWC.reshape(-1, *images_NHWC.shape[2:]))
    return np.array(image.histogram()).reshape(-1, len(VALUES_V))


def colour_axes(images_NHWC: np.ndarray) -> np.ndarray:
    """Return the principal axes of the pixels' colours, one per row; float32 [C, C].

    Each is an eigenvector of the covariance of all pixels, as long as the standard deviation along
    it. An axis has two directions: we take the one whose largest component is positive.
    """
    channels = images_NHWC.shape[-1]
    sums = 0.0
    for block in blocks(images_NHWC):
        # The last column holds ones: then one product gives the sums of values and pixels too.
        pixels_PC = np.ones((block.size // channels, channels + 1))
        pixels_PC[:, :channels] = block.reshape(-1, channels)
        sums = sums + pixels_PC.T @ pixels_PC
    means = sums / sums[-1, -1]
    mean_C = means[-1, :-1]
    variances_C, vectors = np.linalg.eigh(means[:-1, :-1] - np.outer(mean_C, mean_C))
    axes_CC = np.sqrt(np.maximum(variances_C, 0))[:, None] * vectors.T
    largest_C1 = np.take_along_axis(axes_CC, np.abs(axes_CC).argmax(1)[:, None], 1)
    return (axes_CC * np.where(largest_C1 < 0, -1, 1)).astype(np.float32)


def blocks(images_NHWC: np.ndarray) -> list[np.ndarray]:
    """Split the images into blocks of about BLOCK_BYTES."""
    return np.array_split(images_NHWC, -(-images_NHWC.nbytes // BLOCK_BYTES))
