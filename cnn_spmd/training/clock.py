"""An honest clock of training, and the age of this process."""

import concurrent.futures
import math
import os
import pathlib
import time

import jax
import numpy as np


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
        return dict(
            zip(
                ("p10", "median", "p90"),
                np.percentile(times, (10, 50, 90)).round(4).tolist(),
                strict=True,
            )
        )

    def steps_per_second(self) -> float:
        steady = self.steady()
        return (
            sum(steps for steps, _ in steady) / sum(seconds for _, seconds in steady)
            if steady
            else math.nan
        )
