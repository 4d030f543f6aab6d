"""Load scikit-learn's handwritten digits, which need no download."""

import ml_collections
import numpy as np
from PIL import Image

from cnn_spmd.data.dataset import Dataset


def load_digits(data: ml_collections.ConfigDict) -> Dataset:
    """Return scikit-learn's 1,797 digits of 8x8 pixels as images of 32x32x3.

    1,437 are to train on and 360 to test on, the same ones every time. `data` is not used.
    """
    from sklearn import datasets, model_selection  # importing scikit-learn takes a second

    grey_NHW, labels_N = datasets.load_digits(return_X_y=True)
    # Their values are 0 to 16.
    grey_NHW = np.round(grey_NHW.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    larger = [
        Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR) for grey in grey_NHW
    ]
    images_NHWC = np.repeat(np.stack(larger)[..., None], 3, axis=-1)
    labels_N = labels_N.astype(np.int32)
    train, test = model_selection.train_test_split(
        np.arange(len(labels_N)), test_size=360, stratify=labels_N, random_state=0
    )
    return Dataset(
        name="digits",
        train_images=images_NHWC[train],
        train_labels=labels_N[train],
        test_images=images_NHWC[test],
        test_labels=labels_N[test],
        class_names=tuple("0123456789"),
        mirror=False,
    )
