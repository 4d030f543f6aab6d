"""scikit-learn's handwritten digits, which need no download."""

import ml_collections
import numpy as np
from PIL import Image

from cnn_spmd.data import digest
from cnn_spmd.data.dataset import Dataset


def load_digits(data: ml_collections.ConfigDict) -> Dataset:
    """scikit-learn's 8x8 digits as 32x32x3 images: 1,437 to train on, 360 to test on, the same ones every time."""
    from sklearn import datasets, model_selection  # another second

    grey_NHW, labels = datasets.load_digits(return_X_y=True)
    grey_NHW = np.round(grey_NHW.reshape(-1, 8, 8) * (255 / 16)).astype(
        np.uint8
    )  # they count 0 to 16
    images = np.stack(
        [
            np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR))
            for grey in grey_NHW
        ]
    )
    images = np.repeat(images[..., None], 3, axis=-1)
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    labels = labels.astype(np.int32)
    arrays = dict(
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )
    return Dataset(
        name="digits",
        **arrays,
        class_names=tuple("0123456789"),
        mirror=False,
        digest=digest.of_arrays(arrays),
    )
