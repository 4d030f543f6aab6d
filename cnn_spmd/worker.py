"""Run the commands of a sweep one after another in one warm process.

The process is launch.py again, which calls `serve`: it imports jax and takes the devices before the
first command comes. Then it does for each command what launch.py does with it in a process of its
own. It is used again only after a command that ended well. Otherwise the next command gets a fresh
process.
"""

import contextlib
import gc
import os
import pathlib
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from multiprocessing import connection
from typing import Any

from absl import flags, logging

from cnn_spmd import experiment
from cnn_spmd.errors import UserError
from cnn_spmd.training import environment, interrupt, startup

LAUNCH = pathlib.Path(__file__).parent.parent / "launch.py"
# The first argument of launch.py that makes it a worker. Two numbers follow: the file descriptor of
# its pipe to the sweep, and how many devices it simulates (0: none).
ARGUMENT = "worker-of-a-sweep"
LEAVE_SECONDS = 10  # how long a worker may take to leave before it is killed
ALIVE_SECONDS = 1  # how often the sweep looks whether the worker still lives
# What a finished run may leave on the devices: the constants of an experiment's own code.
LEFT_BYTES = 2**20


# ---- The sweep's side


class Worker:
    """A process that runs commands of launch.py; a fresh one after a failure.

    cpu_devices: how many devices it simulates on the CPU; None: it takes the real ones.
    """

    def __init__(self, cpu_devices: int | None):
        self.cpu_devices = cpu_devices
        self._process: subprocess.Popen | None = None
        self._devices: int | UserError | None = None  # what the process says of its devices
        self._has_run = False  # whether it got a command

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self, log: int | None = None) -> None:
        """Start the process, which then imports jax and takes the devices.

        log: the file descriptor for its output until its first command; None: that of the sweep.
        """
        self._pipe, theirs = connection.Pipe()
        self._devices, self._has_run = None, False
        arguments = [ARGUMENT, str(theirs.fileno()), str(self.cpu_devices or 0)]
        # A signal in between would leave a process that nobody knows. In a session of its own, the
        # terminal's Ctrl-C reaches the sweep only, which passes it on once.
        with theirs, interrupt.delayed_signals():
            self._process = subprocess.Popen(
                [sys.executable, LAUNCH, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def device_count(self) -> int:
        """Return how many devices the process has, after `start`.

        Raises UserError where JAX_PLATFORMS names one that is not here.
        """
        self._wait_for_devices()
        if isinstance(self._devices, UserError):
            raise self._devices
        if self._devices is None:
            raise RuntimeError(f"the process that takes the devices ended with {self._end()}")
        return self._devices

    def run(
        self, arguments: Sequence[str], log: pathlib.Path, tick: Callable[[], object] = lambda: None
    ) -> int:
        """Run launch.py with these arguments; return its exit code.

        The code is negative where a signal killed the process. log: the file for all its output.
        tick: called every ALIVE_SECONDS. After a signal to the sweep, it waits until the run has
        saved, and raises KeyboardInterrupt.
        """
        try:
            with log.open("a") as file:
                if self._process is None:
                    self.start(file.fileno())
            self._wait_for_devices()
            self._has_run = True
            with contextlib.suppress(ConnectionError):  # `_answer` finds out that it ended
                self._pipe.send((list(arguments), str(log.absolute())))
            answer = self._answer(tick)
        except KeyboardInterrupt:
            self._interrupt(log.stem)
            raise
        if answer is None:
            return self._end()
        code, leftover = answer
        if leftover:
            logging.warning("%s: the next run gets a fresh process: %s.", log.stem, leftover)
        if code or leftover:
            self.close()
        return code

    def close(self) -> None:
        """End the process; kill it where nothing can be lost, or where it does not leave."""
        if self._process is not None:
            self._let_leave(LEAVE_SECONDS if self._has_run else 0)

    def _wait_for_devices(self) -> None:
        """Hear, once, what a process says as it has started."""
        if self._devices is None:
            self._devices = self._answer()

    def _answer(self, tick: Callable[[], object] = lambda: None) -> Any:
        """Return the next thing that the process sends; None where it ends without.

        tick: called every ALIVE_SECONDS.
        """
        try:
            while not self._pipe.poll(ALIVE_SECONDS):
                # A process that the run started, and that outlives it, may hold the pipe open.
                if self._process.poll() is not None:
                    return None
                tick()
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            return None

    def _end(self) -> int:
        """Return the exit code of a process that ended without an answer, which is never 0."""
        process, self._process = self._process, None
        self._pipe.close()
        return process.wait() or 1

    def _interrupt(self, name: str) -> None:
        """Let the run `name` save, and end the process; a second signal ends it at once."""
        if self._process is None:
            return
        logging.warning(
            "Interrupted: waiting for %s to save; a second signal stops it at once.", name
        )
        self._process.terminate()
        self._let_leave(None)

    def _let_leave(self, seconds: float | None) -> None:
        """Wait until the process leaves, and kill it after these seconds; None: never."""
        try:
            self._pipe.close()  # it leaves as it finds out, even if its run was complete
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None


# ---- The worker's side


def serve(run: Callable[[], object], take_devices: Callable[[int], int]) -> None:
    """Run each command that comes through the pipe, until the sweep closes it.

    run: does what sys.argv says, and exits. take_devices: creates the devices, and counts them;
    its argument is the number to simulate, or 0.
    """
    started = time.time()
    environment.print_plain_lines()
    _, _, descriptor, cpu_devices = sys.argv
    pipe = connection.Connection(int(descriptor))

    def announce_devices() -> None:
        try:
            pipe.send(take_devices(int(cpu_devices)))
        except UserError as error:
            pipe.send(error)

    with futures.ThreadPoolExecutor(1) as pool:
        announced = pool.submit(announce_devices)
        from cnn_spmd.training import loop  # noqa: F401  (what a run needs)
    announced.result()  # raises what else went wrong
    gc.freeze()  # what is imported need not be searched after each run
    # The sweep is gone, or ends this process, or has a signal that came after the run had ended.
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            sys.argv[1:], log = pipe.recv()
            startup.begin_command()
            with open(log, "ab", 0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            with _fresh_settings():
                code = _exit_code_of(run)
            pipe.send((code, "" if code else _leftover(started)))


@contextlib.contextmanager
def _fresh_settings() -> Iterator[None]:
    """Forget the flags of the command before; let this one give all its warnings."""
    import jax

    experiment.forget_flags(flags.FLAGS)
    settings = {name: getattr(jax.config, name) for name in environment.JAX_DEFAULTS}
    with warnings.catch_warnings():  # Python then also forgets which ones it has given
        yield
    for name, value in settings.items():  # the next command resets and reports them again
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


def _exit_code_of(run: Callable[[], object]) -> int:
    """Return the exit code that Python would end the process with after `run`."""
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _leftover(started: float) -> str:
    """Say what keeps this process from another run after one that ended well; or nothing.

    started: when the process began; it may have read the code of any module since then.
    """
    import jax

    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if os.path.isfile(path) and os.path.getmtime(path) > started:
            return f"{path} has changed"
    gc.collect()  # a run's objects refer to each other, and to its arrays on the devices
    left = sum(array.nbytes for array in jax.live_arrays())
    return f"this one leaves {left:,} bytes on the devices" if left > LEFT_BYTES else ""
