"""Record what the time between a command and its first step is spent on.

Stages may overlap: while one thread traces a program, others compile and copy.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_stages: list[dict] = []
_threads: list[threading.Thread] = []
# When a sweep's worker got the command that it runs; None in a process of one command.
_command_began: float | None = None


def begin_command() -> None:
    """Count from now on, as the process of this command has run others before."""
    global _command_began
    _command_began = time.monotonic()
    _stages.clear()


def process_seconds() -> float | None:
    """Return the age of this process in seconds, or that of its command in a sweep's worker.

    It is None where there is no /proc.
    """
    if _command_began is not None:
        return round(time.monotonic() - _command_began, 2)
    try:
        stat = pathlib.Path("/proc/self/stat").read_text()
    except OSError:
        return None
    # Field 22 of man 5 proc_pid_stat, in clock ticks since boot. Field 2, the name of the program,
    # is in parentheses and may hold spaces.
    start_ticks = int(stat.rpartition(")")[2].split()[19])
    seconds_since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return round(seconds_since_boot - start_ticks / os.sysconf("SC_CLK_TCK"), 2)


@contextlib.contextmanager
def stage(name: str, since: float | None = None) -> Iterator[None]:
    """Record the block as a stage; since: when it began, if that was earlier, in seconds."""
    begin = process_seconds() if since is None else since
    yield
    end = process_seconds()
    if begin is not None and end is not None:
        _stages.append(dict(stage=name, begin=begin, end=end))


def add_stage(name: str, seconds: float) -> None:
    """Record a stage that ends now."""
    end = process_seconds()
    if end is not None:
        _stages.append(dict(stage=name, begin=round(end - seconds, 2), end=end))


def take_stages() -> list[dict]:
    """Return the stages so far and forget them: a next run in this process has its own.

    Each has its name, and its begin and end in seconds after the command.
    """
    taken = sorted(_stages, key=lambda stage: stage["begin"])
    _stages.clear()
    return taken


def background(name: str, function: Callable, *arguments) -> concurrent.futures.Future:
    """Call a function in a thread, as a stage; return its result as a future.

    Python does not wait for the thread when it exits, unlike for those of an executor.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            with stage(name):
                result = function(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    thread = threading.Thread(target=run, daemon=True)
    _threads.append(thread)
    thread.start()
    return future


def end_process(code: object) -> None:
    """End the process with an exit code, at once, if a background thread still runs.

    Python aborts the process if it exits while such a thread is inside JAX's C++ code.
    """
    if isinstance(code, int) and any(thread.is_alive() for thread in _threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
