"""The clock counts training only; startup counts from the start of the process."""

import subprocess
import sys
import time

from conftest import ROOT

from cnn_spmd.training import clock as clocks


def test_startup_is_counted_from_the_start_of_the_process():
    """The process waits for half a second before it imports anything of the package."""
    code = """if True:
        import time
        time.sleep(.5)
        from cnn_spmd.training.startup import process_seconds
        first = process_seconds()
        time.sleep(.1)
        print(first, process_seconds() - first)"""
    since = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, more = map(float, result.stdout.split())
    assert 0.45 < first < time.perf_counter() - since + 0.1
    assert 0.05 < more < 0.9


def test_clock_leaves_out_what_is_not_training(monkeypatch):
    # The clock is made at 0 s and started at 10 s; two chunks end; an evaluation ends at 50 s, and
    # then a third chunk.
    now = iter([0.0, 10.0, 12.0, 13.0, 50.0, 51.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))
    clock = clocks.Clock()
    clock.start()
    assert [clock.finish(10, end) for end in [clock.watch({}), clock.watch({})]] == [2.0, 1.0]
    clock.start()
    clock.finish(10, clock.watch({}))
    assert clock.seconds == 4.0
    assert clock.steps_per_second() == 10.0  # the first chunk warms up
    assert clock.step_milliseconds() == dict(p10=100.0, median=100.0, p90=100.0)


def test_percentiles():
    clock = clocks.Clock()
    clock.chunks = [(1, 9.0), *((1, i / 1000) for i in range(11))]
    assert clock.step_milliseconds() == dict(p10=1.0, median=5.0, p90=9.0)


def test_a_process_ends_while_a_thread_is_inside_jax():
    """Python by itself would abort it."""
    code = """if True:
        import itertools, sys, time
        import jax
        from cnn_spmd.training import startup

        def compile_forever():
            for number in itertools.count():
                jax.jit(lambda x: x + number)(1.0).block_until_ready()

        startup.background("compiling", compile_forever)
        time.sleep(1)
        startup.end_process(2)
        sys.exit(2)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")
