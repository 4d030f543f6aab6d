"""Statistics of a training set's images: means, deviations, and the principal axes of colour."""

import numpy as np

SAMPLE_BYTES, CHUNK_BYTES = (
    2**30,
    2**18,
)  # of images that statistics are taken from, in all and at a time (in a cache)


def sample(images_NHWC: np.ndarray) -> np.ndarray:
    """The images that statistics of a training set are taken from: all, or SAMPLE_BYTES of them, evenly spaced."""
    every = -(-images_NHWC.nbytes // SAMPLE_BYTES)
    return images_NHWC[::every] if every > 1 else images_NHWC


def mean_image(images_NHWC: np.ndarray, side: int) -> np.ndarray:
    """The mean of the images, in pixels, and of it the centre of `side` pixels (0: all of it); float32 [side, side, C]."""
    mean_HWC = images_NHWC.mean(0, dtype=np.float64).astype(np.float32)
    top, left = ((size - (side or size)) // 2 for size in mean_HWC.shape[:2])
    return mean_HWC[top : top + side, left : left + side] if side else mean_HWC


def channel_statistics(images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation a channel of uint8 images, exact from their histograms; float32 [C] each, in pixels."""
    values = np.arange(256)
    counts_CV = sum(
        np.stack(
            [np.bincount(chunk[..., c].ravel(), minlength=256) for c in range(chunk.shape[-1])]
        )
        for chunk in _chunks(images_NHWC)
    )
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
        pixels = np.ones(
            (chunk.size // channels, channels + 1)
        )  # the last column: then a product holds the sums, too
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
