"""Stop a run on SIGTERM, on Ctrl-C (SIGINT) or when its terminal closes (SIGHUP).

The first signal asks the run to save and to leave. A second signal ends the process at once.
"""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator

import numpy as np

# nohup starts a process with SIGHUP ignored; such a process must go on when its terminal closes.
HANGUP = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
SIGNALS = (signal.SIGTERM, signal.SIGINT, *HANGUP)
IMPORT_CODE = "<frozen importlib"  # begins the file names of Python's own code for imports
CALLBACK = "_xla_gc_callback"  # of jax; Python calls it often, and swallows what it raises
AGAIN_SECONDS = 0.01  # how long an early signal waits for these to be left
SHOW_CURSOR = b"\x1b[?25h"  # the escape sequence of ANSI terminals
_early_signals: list[int] = []


def handle_early_signal(number: int, frame: types.FrameType | None) -> None:
    """Remember a signal that comes before there is a run, and raise KeyboardInterrupt.

    An exception inside Python's own import code may leave the import lock held, and other threads
    would wait for it for ever. One inside this callback of jax is swallowed, with a traceback. In
    these two places the signal is sent again a moment later. Other callbacks may swallow it too:
    so the next Interrupt also looks at the remembered signals.
    frame: what the main thread executes.
    """
    while frame and frame.f_globals is globals():  # this function may have interrupted itself
        frame = frame.f_back
    code = frame and frame.f_code
    if code and (code.co_filename.startswith(IMPORT_CODE) or code.co_name == CALLBACK):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        return
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)  # a shell may send it twice
    _early_signals.append(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def delayed_signals() -> Iterator[None]:
    """Delay signals until the block ends, then raise KeyboardInterrupt.

    The block is never left half done.
    """
    came: list[int] = []

    def remember(number: int, _) -> None:
        came.append(number)

    handlers = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


class Interrupt:
    """A context that handles signals: `requested()` says whether one came.

    Python runs signal handlers in the main thread only, which may be deep inside a compilation.
    C code therefore writes each signal to a pipe, and a thread of its own reads the pipe.
    A run in another thread leaves signals to the program, as Python lets it set no handlers.
    """

    def __enter__(self) -> "Interrupt":
        self._came = bool(_early_signals)
        self._is_main = threading.current_thread() is threading.main_thread()
        if not self._is_main:
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write)
        self._old = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if not self._is_main:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)  # ends the thread

    def _watch(self) -> None:
        while byte := os.read(self._read, 1):
            number = byte[0]
            if number not in SIGNALS:
                continue
            if number == signal.SIGHUP and self._came:
                continue  # a shell may send it twice
            if self._came:
                _end_at_once(number)
            self._came = True
            print(
                f"\n{signal.Signals(number).name}: saving what there is, then leaving; "
                "a second signal stops at once.",
                file=sys.stderr,
                flush=True,
            )
        os.close(self._read)

    def raise_if_requested(self) -> None:
        """Raise KeyboardInterrupt if a signal came while there is nothing to save."""
        if self.requested():
            raise KeyboardInterrupt

    def requested(self) -> bool:
        """Return whether a signal came to this process, or to any process of the cluster.

        All processes of a cluster must call this at the same point, and get the same answer.
        """
        # Importing jax takes a second, in which signals must already be handled.
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return self._came
        return bool(multihost_utils.process_allgather(np.array(self._came)).any())


def _end_at_once(number: int) -> None:
    """End this process with the exit code of a process that the signal killed."""
    line = f"\n{signal.Signals(number).name} again: stopping at once, nothing more is saved.\n"
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), line.encode())
        if os.isatty(sys.stdout.fileno()):  # a progress bar may have hidden the cursor
            os.write(sys.stdout.fileno(), SHOW_CURSOR)
    os._exit(128 + number)
