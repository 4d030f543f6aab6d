"""Choose which examples each step sees: a pure function of seed, step and config.

Neither the mesh nor the number of processes changes it: each process makes the indices of the whole
batch, and loads what its devices hold (feed.py). Shapes: N examples, S steps, B batch.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Return the order of the examples in one epoch; int32 [N]."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(examples).astype(np.int32)


def train_indices(
    seed: int,
    step: int,
    steps: int,
    batch_size: int,
    examples: int,
    held_out: int = 0,
    held_out_steps: int = 0,
) -> np.ndarray:
    """Return which examples the `steps` steps from `step` on see; int32 [S, B].

    Each epoch is a new permutation of the data set. Examples at its end that do not fill a batch
    are left out of that epoch.

    held_out: the first `held_out_steps` steps do not see the last `held_out` examples, as in
    cuda-convnet's recipes. After these steps, an epoch of the whole data set begins.
    """
    batches = []
    for at in range(step, step + steps):
        first_step, size = held_out_steps, examples
        if at < held_out_steps:
            first_step, size = 0, examples - held_out
        epoch, position = divmod(at - first_step, size // batch_size)
        start = position * batch_size
        key = first_step + epoch  # an offset, so that the second part has permutations of its own
        batches.append(epoch_order(seed, key, size)[start : start + batch_size])
    return np.stack(batches)


def eval_indices(batch_size: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every example once, in order, padded to whole batches.

    These are the indices, int32 [S, B], and a mask, bool [S, B], that is False on the padding. The
    padding begins again with the first example: where the data set is sharded, no device then
    sends more than its share.
    """
    steps = -(-examples // batch_size)
    positions = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    return positions % examples, positions < examples
