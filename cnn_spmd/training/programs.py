"""Compile the programs of a run, and report on them."""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax

from cnn_spmd.data.feed import DeviceData, Feed
from cnn_spmd.data.sharded import Indices, ShardedFeed
from cnn_spmd.training import program_report
from cnn_spmd.training.build import Setup
from cnn_spmd.training.evaluate import Evaluator
from cnn_spmd.training.timetable import Chunk

# One entry for each program that came from JAX's persistent cache instead of being compiled.
_cache_hits: list[str] = []


def _note_cache_hit(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cache_hits.append(event)


jax.monitoring.register_event_listener(_note_cache_hit)


class Programs(NamedTuple):
    """The compiled programs of a run, the feeds of their images, and a report."""

    train: dict[int, jax.stages.Compiled]  # by the number of steps of a chunk
    train_feed: Feed | ShardedFeed
    evaluate: Evaluator
    report: dict  # what program.json holds

    def put_data_on_devices(self) -> None:
        """Put the data set on the devices, unless it is streamed."""
        self.train_feed.load()
        self.evaluate.feed.load()


def compile_programs(setup: Setup, chunks: Iterable[Chunk]) -> Programs:
    """Compile a train program for each length of a chunk, and the evaluation program."""
    n = setup.config.steps_per_call
    hits = len(_cache_hits)
    since = time.perf_counter()
    train = {steps: setup.train_program(steps) for steps in {n, *(chunk.steps for chunk in chunks)}}
    train_feed, test_feed = setup.feeds
    evaluate = Evaluator(setup, test_feed)
    report = program_report.report_of(setup, train[n], n, time.perf_counter() - since)
    report["programs_from_cache"] = len(_cache_hits) - hits
    return Programs(train, train_feed, evaluate, report)


def chunk_inputs(
    setup: Setup, feed: Feed | ShardedFeed, chunks: Iterable[Chunk]
) -> Iterator[tuple[DeviceData, Indices]]:
    """Yield what the program of each chunk takes beside the state.

    A thread prepares the inputs of a chunk while the chunk before it runs.
    """
    return feed.calls(setup.indices(chunk.start, chunk.steps) for chunk in chunks)
