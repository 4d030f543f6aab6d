"""What a run reports while it trains: metrics.jsonl, TensorBoard, a progress bar; and where it ran."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import jax
from rich import progress as rich_progress
from tensorboardX import SummaryWriter

from cnn_spmd.training.runfiles import aside, read

ENVIRONMENT = ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")  # may change a run's last digits
PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


def say(text: str) -> None:
    """Prints a line on one process of a cluster."""
    if jax.process_index() == 0:
        print(text, flush=True)


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
        self.train_seconds = max(
            (
                seconds
                for row in kept
                if isinstance(seconds := row.get("train_seconds"), int | float)
            ),
            default=0.0,
        )
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
        commit = (
            subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd=pathlib.Path(__file__).parent,
                check=False,
            ).stdout.strip()
            or None
        )
    return dict(
        versions=versions | dict(python=platform.python_version()),
        host_cores=os.cpu_count(),
        commit=commit,
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )


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
                rich_progress.TextColumn("step {task.completed}/{task.total}"),
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.fields[text]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, text="")

    def update(
        self, step: int, *, loss: float, accuracy: float, images_per_second: float, eta: float
    ) -> None:
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
