"""Trace some steps of a trained run, for profile.json."""

import itertools
import pathlib
from collections.abc import Iterator

import jax

from cnn_spmd.analysis import profile
from cnn_spmd.training.programs import Programs
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.step import TrainState
from cnn_spmd.training.terminal import say
from cnn_spmd.training.timetable import Chunk
from cnn_spmd.training.workdir import write_run_file


def profile_chunks(
    setup: Setup, programs: Programs, state: TrainState, workdir: pathlib.Path
) -> None:
    """Trace config.profile more steps and write profile.json.

    The steps are rounded up to whole chunks. Their results are thrown away. The state is used up:
    the program takes its memory. Where the trace cannot be read, a warning says so; the run itself
    is complete.
    """
    n = setup.config.steps_per_call
    inputs = setup.inputs(_endless_chunks(setup.config.steps, n))

    def run_chunk() -> dict:
        nonlocal state
        _, of_chunk = next(inputs)
        state, metrics = programs.train[n](state, *of_chunk)
        return metrics

    folder = workdir / "profile" / str(jax.process_index())
    chunks = -(-setup.config.profile // n)
    try:
        traced = profile.trace(run_chunk, chunks, n, folder)
        write_run_file(workdir / "profile.json", traced)
    except (ValueError, RuntimeError) as error:
        say(f"warning: there is no profile: {error}")


def _endless_chunks(steps: int, n: int) -> Iterator[Chunk]:
    """Yield the whole chunks of a run of `steps` steps, at least one, over and over.

    Sharded data are planned for the steps of the run and no further ones (data/sharded.py).
    """
    starts = range(0, max(1, steps - n + 1), n)
    return itertools.cycle([Chunk(start, start + n) for start in starts])
