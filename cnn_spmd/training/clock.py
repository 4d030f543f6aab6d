"""Measure how long training takes."""

import concurrent.futures
import math
import time

import jax
import numpy as np

from cnn_spmd.training import startup


class Clock:
    """Count the seconds of training.

    Compilation, evaluation and checkpoints are left out.

    The devices run behind the host, which launches a chunk before the one before it has ended. The
    time of a chunk is therefore from the end of the chunk before it (or from `start`) to its own
    end. A thread waits for that end, because the host may still be launching the next chunk: on a
    GPU that takes most of the time of a long chunk.
    """

    def __init__(self):
        self.chunks: list[tuple[int, float]] = []  # (steps, seconds) of each
        self.startup_seconds: float | None = None  # the age of the process after the first chunk
        self.startup: list[dict] = []  # what these seconds were spent on (startup.py)
        self._watcher = concurrent.futures.ThreadPoolExecutor(1)
        self._since = time.perf_counter()

    def start(self) -> None:
        """Count from now on: the time since the last chunk was not training."""
        self._since = time.perf_counter()

    def watch(self, outputs: dict) -> concurrent.futures.Future:
        """Return the time at which a chunk ends that returned `outputs`, as a future."""

        def wait() -> float:
            jax.block_until_ready(outputs)
            return time.perf_counter()

        return self._watcher.submit(wait)

    def finish(self, steps: int, end: concurrent.futures.Future) -> float:
        """Wait for the `end` of a chunk of `steps` steps; return its seconds."""
        seconds = end.result() - self._since
        self._since = end.result()
        self.chunks.append((steps, seconds))
        if self.startup_seconds is None:
            startup.add_stage("the first chunk", seconds)
            self.startup = startup.take_stages()
            self.startup_seconds = startup.process_seconds()  # last: no stage ends later
        return seconds

    @property
    def seconds(self) -> float:
        """Return the sum over all chunks."""
        return sum(seconds for _, seconds in self.chunks)

    def steady_chunks(self) -> list[tuple[int, float]]:
        """Return all chunks except the first, which also fills caches and pipelines."""
        return self.chunks[1:] or self.chunks

    def step_milliseconds(self) -> dict[str, float] | None:
        """Return percentiles, over steady chunks, of the mean step time in a chunk."""
        if not self.chunks:
            return None
        times = [1e3 * seconds / steps for steps, seconds in self.steady_chunks()]
        p10, median, p90 = np.percentile(times, (10, 50, 90)).round(4).tolist()
        return dict(p10=p10, median=median, p90=p90)

    def steps_per_second(self) -> float:
        """Return the rate over steady chunks; NaN before the first chunk has ended."""
        if not self.chunks:
            return math.nan
        steps, seconds = map(sum, zip(*self.steady_chunks(), strict=True))
        return steps / seconds
