"""Random images, for timing."""

import math

import ml_collections
import numpy as np

from cnn_spmd.data import digest
from cnn_spmd.data.dataset import Dataset


def load_synthetic(data: ml_collections.ConfigDict) -> Dataset:
    """Random images and labels of the sizes in data.synthetic, the same ones every time: for timing, not learning."""
    sizes = data.synthetic
    rng, arrays = np.random.Generator(np.random.SFC64(0)), {}
    for split, n in (("train", sizes.train_examples), ("test", sizes.test_examples)):
        shape = n, sizes.image_size, sizes.image_size, 3
        words = rng.bit_generator.random_raw(
            -(-math.prod(shape) // 8)
        )  # eight bytes each: 5 times as fast as bytes
        arrays[f"{split}_images"] = words.view(np.uint8)[: math.prod(shape)].reshape(shape)
        arrays[f"{split}_labels"] = rng.integers(sizes.classes, size=n, dtype=np.int32)
    class_names = tuple(str(i) for i in range(sizes.classes))
    of_sizes = digest.of_text(f"SFC64(0) {sorted(sizes.items())}")  # that of pixels would take long
    return Dataset(
        name="synthetic", **arrays, class_names=class_names, mirror=True, digest=of_sizes
    )
