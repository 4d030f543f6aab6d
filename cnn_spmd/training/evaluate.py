"""Evaluate a state on the whole test split: of a run in progress, or one that was trained."""

import datetime
import json
import math
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import ml_collections
from absl import logging

from cnn_spmd import config as configs
from cnn_spmd.data import augment, order
from cnn_spmd.data.dataset import Dataset, Unread
from cnn_spmd.data.feed import put
from cnn_spmd.errors import UserError
from cnn_spmd.training import build, restore, runfiles, weights
from cnn_spmd.training.provenance import provenance
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.step import TrainState
from cnn_spmd.training.terminal import say

# What an evaluation may change of a run's config; data.validation only to 0, the test split.
OF_EVALUATION = ("batch_size", "dtype", "eval.views", "data.skip_bad", "data.validation")
MAY_DIFFER = configs.COMPUTING + OF_EVALUATION
FILE = "evaluations.jsonl"


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

    A metric of the user's own that is not finite is left out, with a warning.

    sums: the results of eval_step, one per batch: sums over its examples, and its `examples`.
    Raises AssertionError unless all `examples` of the split were counted.
    """
    totals = {name: sum(float(batch[name]) for batch in sums) for name in sums[0]}
    counted = totals.pop("examples")
    if counted != examples:
        raise AssertionError(f"evaluated {counted} examples of {examples}")
    means = {name: total / examples for name, total in totals.items()}
    for name in set(means) - {"loss"}:  # the callers refuse such a loss
        if not math.isfinite(means[name]):
            logging.warning("METRICS[%r] is %s over these images: left out.", name, means[name])
            del means[name]
    return means | dict(examples=examples)


# ---- What was trained


def evaluate_saved(
    source: pathlib.Path | None,
    config: ml_collections.ConfigDict,
    data: Dataset | Unread | None = None,
) -> dict:
    """Evaluate what was trained, say the result and return it.

    source: the folder of a run, which gets the result as a line of FILE, or a weights file. None
    stands for the weights of config.init_from, or of the seed. config, data: as for
    restore.restore.
    Raises UserError as restore.restore, and for a loss that is not finite.
    """
    if source is None:
        setup = build.prepare(config, data=data)
        restored = restore.Restored(setup, setup.init(), 0, None)
        return evaluate_restored(config.init_from or "the initial weights", restored)
    with restore.locked(source, "--workdir="):
        restored = restore.restore(source, config, weights.read_saved(source), data)
        result = evaluate_restored(str(source), restored)
        if not weights.is_file(source) and jax.process_index() == 0:
            append(source / FILE, result)
    return result


def evaluate_restored(name: str, restored: restore.Restored) -> dict:
    """Evaluate a restored state; say the result and return it as a line of FILE.

    name: of what is evaluated.
    """
    setup = restored.setup
    program = setup.lower_evaluation().compile()
    setup.feeds[1].load()
    metrics = Evaluator(setup, program)(restored.state)
    config, place = setup.config, setup.place
    values = {name: value for name, value in metrics.items() if name != "examples"}
    if not math.isfinite(metrics["loss"]):
        raise UserError(f"{name}: loss is {metrics['loss']}, expected weights that are finite")
    others = [f"{name} {value:.4f}" for name, value in values.items() if name != "accuracy"]
    earlier = "" if restored.accuracy is None else f" (recorded: {restored.accuracy:.2%})"
    steps = f" after {restored.step} steps" if restored.step else ""
    say(
        f"Evaluated {name}{steps} on {metrics['examples']} test images of {setup.shown_data}:\n"
        f"accuracy {metrics['accuracy']:.2%}{earlier}, {', '.join(others)}; mesh "
        f"{place.mesh_name}, {config.parallelism}, {config.dtype}"
    )
    return dict(
        schema=runfiles.SCHEMA,
        step=restored.step,
        **setup.data_fields,
        **metrics,
        mesh=dict(place.mesh.shape),
        parallelism=config.parallelism,
        dtype=config.dtype,
        batch_size=config.batch_size,
        views=augment.views_taken(config.eval.views, setup.data.mirror),
        device_kind=place.mesh.devices.flat[0].device_kind,
        **provenance(),
        evaluated=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def refuse_changes(given: Collection[str]) -> None:
    """Raise UserError for a field set by hand that belongs to what was trained."""
    for field in given:
        if not configs.is_part_of(field, MAY_DIFFER):
            raise UserError(
                f"--config.{field}: belongs to what was trained, expected one of "
                f"{', '.join(MAY_DIFFER)} with --evaluate and --workdir"
            )


def append(path: pathlib.Path, line: dict) -> None:
    """Append a line of JSON to a file. Raises UserError where that fails."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
