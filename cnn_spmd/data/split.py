"""Hold out a part of a training set, to test on, where a data set has no such part."""

import numpy as np

from cnn_spmd.data.source import Split, select
from cnn_spmd.errors import UserError

# As in the digits. Prepared folders of photographs do not say which share and seed they were made
# with: another value needs another folder.FORM.
TEST_SHARE = 0.2
SEED = 0  # not that of the run: runs of different seeds are tested on the same images


def hold_out(labels_N: np.ndarray, where: str) -> np.ndarray:
    """Return which of N images to test on, bool [N]: TEST_SHARE of each class, at least one.

    They are chosen at random, and are the same whenever the labels are the same.
    labels_N: numbers or names of classes. where: names the data set. Raises UserError for a class
    that has a single image.
    """
    generator = np.random.Generator(np.random.Philox(key=SEED))
    is_test_N = np.zeros(len(labels_N), bool)
    for label in np.unique(labels_N):
        (members,) = np.nonzero(labels_N == label)
        if len(members) < 2:
            raise UserError(
                f"{where}: has nothing to test on, and 1 image of class {label}, expected at least "
                "2: one to train on and one to test on"
            )
        count = max(1, round(TEST_SHARE * len(members)))
        is_test_N[generator.choice(members, count, replace=False)] = True
    return is_test_N


def hold_out_photographs(train: Split, labels_N: np.ndarray, where: str) -> dict[str, Split]:
    """Return the splits "train" and "test" of photographs, as `hold_out` divides them."""
    is_test_N = hold_out(labels_N, where)
    parts = dict(train=~is_test_N, test=is_test_N)
    return {name: select(train, np.flatnonzero(part)) for name, part in parts.items()}
