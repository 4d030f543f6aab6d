"""Log a run: metrics.jsonl, trackers such as TensorBoard, its progress, what ran."""

import bisect
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np
from absl import logging

from cnn_spmd import config as configs
from cnn_spmd.training import cluster, runfiles
from cnn_spmd.training.clock import Clock
from cnn_spmd.training.provenance import command, provenance
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.terminal import Progress, say
from cnn_spmd.training.timetable import Chunk, Timetable

# What a line of metrics.jsonl says about itself; a curve of it would show nothing.
COUNTERS = ("steps", "examples", "batches", "train_seconds")
# The group of a scalar's tag, by the split of its line. The last evaluation ends the curve of those
# before it.
GROUPS = dict(eval="test", final="test")


class Tracker(Protocol):
    """What receives a run's curves, such as TensorBoard or a service."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Receive the scalars of a step, by tag; two calls may be about the same step."""

    def close(self) -> None:
        """End; the run may have failed."""


# Name -> a function of the run's folder and the step at which the run starts. It is called once per
# run, when config.json is there already. An experiment may add trackers beside TensorBoard.
TRACKERS: dict[str, Callable[[pathlib.Path, int], Tracker]] = {}


def tagged(split: str, values: dict[str, float]) -> dict[str, float]:
    """Return a line's values by their tags, such as test/accuracy, without COUNTERS."""
    scalars = {}
    for name, value in values.items():
        if name not in COUNTERS:
            group = "speed" if name == "images_per_second" else GROUPS.get(split, split)
            scalars[f"{group}/{name}"] = value
    return scalars


class MetricsFile:
    """Write metrics.jsonl, and its curves to the trackers, on process 0 of a cluster.

    step: where the run starts. What an earlier command wrote after it is dropped.
    fields: those that every line has, such as the data set. is_evaluated: whether an earlier
    command evaluated this step.
    """

    def __init__(self, workdir: pathlib.Path, step: int, fields: dict):
        path = workdir / "metrics.jsonl"
        self._enabled = jax.process_index() == 0
        self._fields = dict(schema=runfiles.SCHEMA) | fields
        if step == 0 and self._enabled and path.exists():
            os.replace(path, runfiles.free_old_name(path))
        rows = runfiles.read_metrics_rows(path)
        rows = [row for row in rows if row["step"] <= step and row["split"] != "final"]
        self.is_evaluated = any(row["step"] == step and row["split"] == "eval" for row in rows)
        seconds = [row.get("train_seconds") for row in rows]
        self.train_seconds = max((s for s in seconds if isinstance(s, int | float)), default=0.0)
        if not self._enabled:
            return
        last = max((row["step"] for row in rows if row["split"] == "train"), default=0)
        if last < step:
            logging.warning(
                "%s has lost what was logged of the steps %d to %d.", path, last + 1, step
            )
        with runfiles.atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", buffering=1)
        # Importing it takes a while; programs.py does so while XLA compiles.
        from cnn_spmd.training import board

        makers = (board.Board, *TRACKERS.values())
        self._trackers = [make(workdir, step) for make in makers]

    def write(self, step: int, split: str, **values: float) -> None:
        """Append the line {"step", "split", ...}, and pass its scalars on to the trackers."""
        if not self._enabled:
            return
        row = dict(step=step, split=split, **values, **self._fields)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        for tracker in self._trackers:
            tracker.write(step, tagged(split, values))

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._enabled:
            self._file.close()
            for tracker in self._trackers:
                tracker.close()


def about_run(setup: Setup, report: dict, steps: int) -> dict:
    """Return the fields of a summary that setup, program and number of steps decide.

    report: what program.json holds.
    """
    config, mesh = setup.config, setup.place.mesh
    steps_per_epoch = len(setup.data.train_images) // config.batch_size
    return dict(
        schema=runfiles.SCHEMA,
        experiment=config.experiment,
        **setup.data_fields,
        data_on_device=report["data_on_device"],
        page_locked=setup.feeds[0].page_locked,
        model=config.model.name,
        parallelism=config.parallelism,
        mesh=dict(mesh.shape),
        devices=mesh.size,
        device_kind=report["compiler"]["device_kind"],
        processes=jax.process_count(),
        batch_size=config.batch_size,
        steps=steps,
        epochs=round(steps / steps_per_epoch, 3),
        seed=config.seed,
        dtype=config.dtype,
        param_count=report["param_count"],
        compile_seconds=report["compile_seconds"],
        programs_from_cache=report["programs_from_cache"],
        bytes_per_device=report["bytes_per_device"],
        collectives=report["collectives"],
        predicted_milliseconds=(report.get("prediction") or {}).get("predicted_milliseconds"),
        **provenance(),
        command=command(),
        data_digest=setup.data.digest,
        config=configs.as_json(config),
    )


class Log:
    """Record each chunk and each evaluation of a run, in files and on the terminal."""

    def __init__(self, setup: Setup, workdir: pathlib.Path, timetable: Timetable):
        config = setup.config
        self.batch_size, self.timetable = config.batch_size, timetable
        self.clock, self.rates = Clock(), setup.rates
        self._file = MetricsFile(workdir, timetable.start, setup.data_fields)
        self._progress = Progress(config.steps)
        self._images = configs.evaluated_split(config)
        self._evaluation_seconds = 0.0

    def chunk(self, chunk: Chunk, metrics: dict[str, np.ndarray], seconds: float) -> None:
        """Record a chunk. metrics: one value per step; what is logged is their mean."""
        means = {name: float(values.mean()) for name, values in metrics.items()}
        images_per_second = chunk.steps * self.batch_size / seconds
        self._file.write(
            chunk.end,
            "train",
            **means,
            images_per_second=images_per_second,
            learning_rate=float(self.rates(chunk.end - 1, 1)[0]),
            steps=chunk.steps,
            train_seconds=self.train_seconds,
        )
        self._progress.update(
            chunk.end,
            loss=means["loss"],
            accuracy=means["accuracy"],
            images_per_second=images_per_second,
            eta=self._seconds_left(chunk.end),
        )

    def evaluation(self, step: int, split: str, result: dict, seconds: float) -> None:
        """Record an evaluation, whose `result` holds metrics by name."""
        self._evaluation_seconds = seconds
        self._file.write(step, split, **result)
        say(
            f"step {step}/{self.timetable.last}  {split}: {self._images} accuracy "
            f"{result['accuracy']:.2%}, loss {result['loss']:.4f} over {result['examples']} images"
        )

    def noise_scale(self, step: int, result: dict[str, float]) -> None:
        """Record a measurement of the gradient's noise (noise_scale.py)."""
        if not all(map(math.isfinite, result.values())):
            say(f"warning: there is no noise scale at step {step}: a gradient is not finite")
            return
        self._file.write(step, "noise", **result)
        scale = result.get("noise_scale")
        shown = "unknown, more batches are needed" if scale is None else f"{scale:,.0f} images"
        say(f"step {step}/{self.timetable.last}  noise scale: {shown}")

    @property
    def is_evaluated(self) -> bool:
        """Return whether an earlier command evaluated the step at which the run starts."""
        return cluster.exchange(self._file.is_evaluated)[0]  # process 0 has the file

    @property
    def train_seconds(self) -> float:
        """Return the seconds of training so far, by this command and earlier ones."""
        return self._file.train_seconds + self.clock.seconds

    def speed(self) -> dict:
        """Return the fields of summary.json that say how fast training was."""
        images_per_second = self.clock.steps_per_second() * self.batch_size
        return dict(
            startup_seconds=self.clock.startup_seconds,
            startup=self.clock.startup,
            train_seconds=round(self.train_seconds, 3),
            images_per_second=round(images_per_second, 1) if self.clock.chunks else None,
            step_milliseconds=self.clock.step_milliseconds(),
            steady_calls=len(self.clock.steady_chunks()),
        )

    def close(self) -> None:
        """Close the files and leave the progress bar."""
        self._progress.close()
        self._file.close()

    def _seconds_left(self, step: int) -> float:
        """Estimate: steps at the steady rate, evaluations as long as the last one took."""
        evaluations = self.timetable.evaluations
        left = len(evaluations) - bisect.bisect_left(evaluations, step) + 1  # 1: the final one
        steps_left = self.timetable.last - step
        return steps_left / self.clock.steps_per_second() + left * self._evaluation_seconds
