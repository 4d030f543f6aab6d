"""Which examples each step sees: a pure function of (seed, step).

Neither the mesh nor the number of processes changes it. Shapes: N examples, S steps, B batch.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of the examples in one epoch; int32 [N]."""
    return (
        np.random.Generator(np.random.Philox(key=[seed, epoch]))
        .permutation(examples)
        .astype(np.int32)
    )


def train_indices(
    seed: int,
    step: int,
    steps: int,
    batch_size: int,
    examples: int,
    held_out: int = 0,
    held_out_steps: int = 0,
) -> np.ndarray:
    """Which examples the `steps` steps from `step` on see; int32 [S, B].

    Each epoch is a new permutation of the data set; the rest that does not fill a batch is left out of that epoch.
    held_out: the last so many examples are not in the data set of the first `held_out_steps` steps; after these, an epoch of
    the whole begins.
    """

    def one(step):
        begin, size = (
            (0, examples - held_out) if step < held_out_steps else (held_out_steps, examples)
        )
        epoch, at = divmod(step - begin, size // batch_size)
        return _epoch_order(seed, begin + epoch, size)[at * batch_size : (at + 1) * batch_size]

    return np.stack([one(s) for s in range(step, step + steps)])


def eval_indices(batch_size: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Every example once, in order: indices int32 [S, B] and a mask bool [S, B] that is False on the padding."""
    steps = -(-examples // batch_size)
    flat = np.arange(steps * batch_size, dtype=np.int32)
    return np.minimum(flat, examples - 1).reshape(steps, batch_size), (flat < examples).reshape(
        steps, batch_size
    )
