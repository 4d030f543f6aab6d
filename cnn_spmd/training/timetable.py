"""Plan the steps at which a run evaluates and saves, and the chunks between."""

from typing import NamedTuple

import ml_collections


class Chunk(NamedTuple):
    """The steps of one compiled call: `start` are done before it, `end` after it."""

    start: int
    end: int

    @property
    def steps(self) -> int:
        """Return how many steps the chunk has."""
        return self.end - self.start


class Timetable(NamedTuple):
    """What a run does after which step."""

    start: int
    last: int  # evaluate and save after it, too
    evaluations: range  # the steps to evaluate after, before the last one
    saves: range  # the steps to save after, before the last one
    steps_per_call: int  # the most steps of a chunk

    @property
    def stops(self) -> list[int]:
        """Return the steps at which a run evaluates or saves, and the last, in order."""
        steps = {*self.evaluations, *self.saves, self.last}
        return sorted(step for step in steps if step > self.start)

    @property
    def chunks(self) -> list[Chunk]:
        """Return the chunks from stop to stop."""
        return split_into_chunks(self.start, self.stops, self.steps_per_call)


def make_timetable(config: ml_collections.ConfigDict, examples: int, start: int) -> Timetable:
    """Return the timetable from step `start` on; examples: training images."""
    steps_per_epoch = examples // config.batch_size

    def every(epochs: int) -> range:
        interval = epochs * steps_per_epoch
        return range(interval, config.steps, interval) if interval else range(0)

    evaluations, saves = every(config.eval.every_epochs), every(config.checkpoint.every_epochs)
    return Timetable(start, config.steps, evaluations, saves, config.steps_per_call)


def split_into_chunks(start: int, stops: list[int], steps_per_call: int) -> list[Chunk]:
    """Return the chunks from step `start` on, each of at most `steps_per_call` steps.

    Each of the `stops`, which are in order, is the end of a chunk.
    """
    chunks = []
    for stop in stops:
        while start < stop:
            end = min(start + steps_per_call, stop)
            chunks.append(Chunk(start, end))
            start = end
    return chunks
