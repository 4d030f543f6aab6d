"""What a run tells: metrics.jsonl (the source of truth), TensorBoard, a progress bar, and an honest clock."""

import concurrent.futures
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from rich import progress as rich_progress
from tensorboardX import SummaryWriter

ENVIRONMENT = ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")  # may change a run's last digits
PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


def say(text: str) -> None:
    """Prints a line on one process of a cluster."""
    if jax.process_index() == 0:
        print(text, flush=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON whole or not at all: a kill in between leaves the old file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


class Metrics:
    """metrics.jsonl and TensorBoard of one run; resuming at `step` drops what was written after it.

    identity: fields that each line carries, such as the data set; enabled: False on all processes but one.
    """

    def __init__(self, workdir: pathlib.Path, step: int, identity: dict, enabled: bool = True):
        path = workdir / "metrics.jsonl"
        self._identity, self._enabled = identity, enabled
        if not step and enabled and path.exists():
            os.replace(path, aside(path))
        kept = [row for row in read(path) if row["step"] <= step and row["split"] != "final"]
        self.train_seconds = max((seconds for row in kept if isinstance(seconds := row.get("train_seconds"), int | float)),
                                 default=0.0)
        if not enabled:
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir.absolute()), purge_step=step + 1)

    def write(self, step: int, split: str, **values: float) -> None:
        """Appends one line {"step", "split", ...} and the same as TensorBoard scalars `split`/name."""
        if not self._enabled:
            return
        row = dict(step=step, split=split, **values, **self._identity)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        if self._enabled:
            self._file.close()
            self._board.close()


def read(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl. A last line that was cut by a kill is left out; a damaged one elsewhere, with a warning."""
    rows, lines = [], path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row["step"], int) and isinstance(row["split"], str)):
                raise TypeError("no step of a split")
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                logging.warning("%s: line %d is damaged and left out.", path, number)
    return rows


def aside(path: pathlib.Path) -> pathlib.Path:
    """The first free name for the old metrics: metrics.jsonl.old, metrics.jsonl.old-2, ..."""
    names = itertools.chain([f"{path.name}.old"], (f"{path.name}.old-{n}" for n in itertools.count(2)))
    return next(kept for name in names if not (kept := path.with_name(name)).exists())


def provenance() -> dict:
    """Versions of what computes, the host's cores, this code's commit, and what is set of ENVIRONMENT.

    The commit is what the environment variable COMMIT says, for code that was copied without its history; else git's, which
    ends in -dirty where tracked files differ from it; else None.
    """
    names = dict(jax="jax", jaxlib="jaxlib", flax="flax", optax="optax", orbax="orbax-checkpoint")
    versions = {name: importlib.metadata.version(package) for name, package in names.items()}
    commit = os.environ.get("COMMIT")
    if not commit and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent,
                                check=False).stdout.strip() or None
    return dict(versions=versions | dict(python=platform.python_version()), host_cores=os.cpu_count(), commit=commit,
                environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ})


def process_seconds() -> float | None:
    """How long ago this process was started, as Linux counts it; None elsewhere."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 2)


class Clock:
    """Seconds of training steps, with compilation, evaluation and checkpoints left out.

    Steps run ahead of the host, so a call's time is from the end of the call before it (or from `start`) to its own end. A
    thread of its own sees that end: the host may still be launching the next call, which takes a GPU's host most of a long one.
    """

    def __init__(self):
        self.calls: list[tuple[int, float]] = []  # steps, seconds
        self._watcher = concurrent.futures.ThreadPoolExecutor(1)
        self._since = time.perf_counter()

    def start(self) -> None:
        """Training goes on from here: what came since the last call is not training."""
        self._since = time.perf_counter()

    def watch(self, values: dict) -> concurrent.futures.Future:
        """When a call ends that returned `values`, for `tick`."""
        return self._watcher.submit(lambda: (jax.block_until_ready(values), time.perf_counter())[1])

    def tick(self, steps: int, end: concurrent.futures.Future) -> float:
        """Waits for the `end` of a call of `steps` steps; returns its seconds."""
        seconds, self._since = end.result() - self._since, end.result()
        self.calls.append((steps, seconds))
        return seconds

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.calls)

    def steady(self) -> list[tuple[int, float]]:
        """All calls but the first, which also fills caches and pipelines."""
        return self.calls[1:] or self.calls

    def step_milliseconds(self) -> dict[str, float] | None:
        """Median, 10th and 90th percentile over steady calls of the mean step time within a call."""
        if not self.calls:
            return None
        times = [1e3 * seconds / steps for steps, seconds in self.steady()]
        return dict(zip(("p10", "median", "p90"), np.percentile(times, (10, 50, 90)).round(4).tolist(), strict=True))

    def steps_per_second(self) -> float:
        steady = self.steady()
        return sum(steps for steps, _ in steady) / sum(seconds for _, seconds in steady) if steady else math.nan


class Progress:
    """A rich progress bar on a terminal, a plain line every PLAIN_SECONDS elsewhere; nothing where `show` is False.

    The ETA is the remaining steps at the steady rate plus the evaluations to come at what the last one took.
    """

    def __init__(self, steps: int, show: bool = True):
        self.steps, self.show = steps, show
        self._line_at = -math.inf
        self._bar = None
        if show and sys.stdout.isatty():
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("step {task.completed}/{task.total}"), rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.fields[text]}"))
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, text="")

    def update(self, step: int, *, loss: float, accuracy: float, images_per_second: float, eta: float) -> None:
        """loss in nats, accuracy from 0 to 1, eta in seconds."""
        if not self.show:
            return
        minutes, seconds = divmod(round(eta), 60)
        text = f"loss {loss:.4f}  accuracy {accuracy:6.2%}  {images_per_second:,.0f} images/s  ETA {minutes}:{seconds:02d}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif time.perf_counter() - self._line_at >= PLAIN_SECONDS or step == self.steps:
            self._line_at = time.perf_counter()
            self.say(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.show:
            print(text, flush=True)  # the bar redirects sys.stdout

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
