"""Print the lines of a run, and its progress."""

import math
import sys
import time

import jax
from rich import progress

from cnn_spmd.data.progress import clock_text

PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


def say(text: str) -> None:
    """Print a line on process 0 of a cluster; a progress bar stays below it."""
    if jax.process_index() == 0:
        print(text, flush=True)  # rich redirects sys.stdout while it shows a bar


class Progress:
    """Show the progress of a run on process 0 of a cluster.

    On a terminal this is a bar, otherwise a plain line every PLAIN_SECONDS and at the last step.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self._next_line = -math.inf  # not before this time
        self._bar = None
        self._silent = jax.process_index() != 0
        if not self._silent and sys.stdout.isatty():
            self._bar = progress.Progress(
                progress.TextColumn("step {task.completed}/{task.total}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[text]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, text="the first steps ...")

    def update(
        self, step: int, *, loss: float, accuracy: float, images_per_second: float, eta: float
    ) -> None:
        """Show the state after `step`: loss in nats, accuracy from 0 to 1, eta in seconds."""
        if self._silent:
            return
        text = (
            f"loss {loss:.4f}  accuracy {accuracy:6.2%}  {images_per_second:,.0f} images/s  "
            f"ETA {clock_text(eta)}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif time.perf_counter() >= self._next_line or step == self.steps:
            self._next_line = time.perf_counter() + PLAIN_SECONDS
            say(f"step {step}/{self.steps}  {text}")

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
