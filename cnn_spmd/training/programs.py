"""Compile the programs of a run, and report on them."""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from cnn_spmd.training import checkpoint, startup
from cnn_spmd.training.evaluate import Evaluator
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.timetable import Chunk

# One entry for each program that came from JAX's persistent cache instead of being compiled.
_cache_hits: list[str] = []


def _note_cache_hit(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cache_hits.append(event)


jax.monitoring.register_event_listener(_note_cache_hit)


class Programs(NamedTuple):
    """The compiled programs of a run, and a report on the train program."""

    train: dict[int, jax.stages.Compiled]  # by the number of steps of a chunk
    evaluate: Evaluator
    init: jax.stages.Compiled  # of a seed: the state at step 0
    all_finite: jax.stages.Compiled  # of (parameters, model state): whether all elements are
    report: dict  # what program.json holds


def compile_programs(setup: Setup, chunks: Sequence[Chunk]) -> Programs:
    """Compile the programs of a run side by side, while the data set moves to the devices.

    This thread traces them; the train step comes first, as it takes longest to compile. Meanwhile
    XLA compiles, and JAX copies, in other threads.
    """
    n = setup.config.steps_per_call
    # One after another: XLA finds out by trials how a kernel runs best, and keeps the result. The
    # next program needs no trials for the same kernels.
    lengths = dict.fromkeys([n, *(chunk.steps for chunk in chunks)])
    hits, since = len(_cache_hits), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor() as pool:

        def start(stage: str, function: Callable, *arguments) -> concurrent.futures.Future:
            return pool.submit(startup.stage(stage)(function), *arguments)

        def trace(name: str, function: Callable, *arguments) -> jax.stages.Lowered:
            return startup.stage(f"tracing {name}")(function)(*arguments)

        trace("the train step", setup.lower_train, n)
        train = start(
            "compiling the train step",
            lambda: {steps: setup.train_program(steps) for steps in lengths},
        )
        moves = [start("moving the images", feed.load) for feed in setup.feeds]
        first = chunks[0].start if chunks else 0
        rates = start("learning rates", setup.rates, first, 1)
        others = [
            start(f"compiling {name}", trace(name, lower).compile)
            for name, lower in (
                ("init", setup.lower_init),
                ("the evaluation", setup.lower_evaluation),
                ("the test for NaN", setup.lower_all_finite),
            )
        ]
        with startup.stage("imports for later"):  # while XLA works
            checkpoint.orbax()
            from cnn_spmd.training import board  # noqa: F401
        program = train.result()[n]
        with startup.stage("report"):
            report = setup.report_on(program, n, estimate=False)
        init, evaluation, all_finite = (future.result() for future in others)
        report["compile_seconds"] = round(time.perf_counter() - since, 2)
        for done in [*moves, rates]:
            done.result()
    report["programs_from_cache"] = len(_cache_hits) - hits
    evaluate = Evaluator(setup, evaluation)
    return Programs(train.result(), evaluate, init, all_finite, report)
