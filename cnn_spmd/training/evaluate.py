"""Evaluate a state on the whole test split."""

from typing import Any

import jax

from cnn_spmd.data import order
from cnn_spmd.data.feed import put
from cnn_spmd.training.build import Setup
from cnn_spmd.training.step import TrainState


class Evaluator:
    """The compiled evaluation program and the test split; call it with a state."""

    def __init__(self, setup: Setup, program: jax.stages.Compiled):
        """Put the masks on the devices. The feed of the test split must be loaded already."""
        batch_size = setup.config.batch_size
        self.program = program
        _, self.feed = setup.feeds
        self.examples = len(setup.data.test_images)
        self.indices, masks = order.eval_indices(batch_size, self.examples)
        self.masks = [
            put(mask, setup.place.sharding(("conv_batch",), mask.shape)) for mask in masks
        ]

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """Return loss (nats), accuracy and the other metrics as means, and `examples`."""
        sums = []
        for inputs, mask in zip(self.feed.calls(self.indices), self.masks, strict=True):
            sums.append(self.program(state, *inputs, mask))
            # Only two batches at once: otherwise all test images would pile up on the devices.
            jax.block_until_ready(sums[-2:][0])
        return means_of(sums, self.examples)


def means_of(sums: list[dict], examples: int) -> dict[str, Any]:
    """Return the means over a split, by name, and `examples`.

    sums: the results of eval_step, one per batch: sums over its examples, and its `examples`.
    Raises AssertionError unless all `examples` of the split were counted.
    """
    totals = {name: sum(float(batch[name]) for batch in sums) for name in sums[0]}
    counted = totals.pop("examples")
    if counted != examples:
        raise AssertionError(f"evaluated {counted} examples of {examples}")
    means = {name: total / examples for name, total in totals.items()}
    return means | dict(examples=examples)
