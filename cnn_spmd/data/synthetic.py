"""Make random images, for measuring speed."""

import math

import ml_collections
import numpy as np

from cnn_spmd.data import digest
from cnn_spmd.data.dataset import Dataset


def load_synthetic(data: ml_collections.ConfigDict) -> Dataset:
    """Return random images and labels, always the same, of sizes data.synthetic."""
    sizes = data.synthetic
    generator = np.random.Generator(np.random.SFC64(0))
    arrays = {}
    for split, examples in (("train", sizes.train_examples), ("test", sizes.test_examples)):
        shape = (examples, sizes.image_size, sizes.image_size, 3)
        # Drawing words of eight bytes is five times as fast as drawing bytes.
        words = generator.bit_generator.random_raw(-(-math.prod(shape) // 8))
        arrays[f"{split}_images"] = words.view(np.uint8)[: math.prod(shape)].reshape(shape)
        arrays[f"{split}_labels"] = generator.integers(sizes.classes, size=examples, dtype=np.int32)
    return Dataset(
        name="synthetic",
        **arrays,
        class_names=tuple(str(i) for i in range(sizes.classes)),
        # A digest of the pixels would take long, and they are a function of the sizes.
        digest=digest.of_text(f"SFC64(0) {sorted(sizes.items())}"),
    )
