"""Stop on SIGTERM, Ctrl-C or a closed terminal (SIGHUP): the first signal asks the run to save and leave, a second one stops
the process at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import numpy as np

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    *([] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]),
)
SHOW_CURSOR = b"\x1b[?25h"
_came_early: list[int] = []


def early(number: int, _) -> None:
    """The handler until a run is an Interrupt, which sees that a signal came where a callback of XLA lost the exception."""
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)  # a shell may send it once more
    _came_early.append(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals that come meanwhile are told at the end, by KeyboardInterrupt: what is begun here is done."""
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


class Interrupt:
    """A context in which `requested()` tells whether a signal came.

    A thread reads the signals off a pipe that C code writes to, so a second one works even while the main thread is
    deep inside a compilation.
    """

    def __enter__(self) -> "Interrupt":
        self._came = bool(_came_early)
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        self._write = write
        self._old_fd = signal.set_wakeup_fd(write)
        self._old = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)  # ends the thread

    def _watch(self) -> None:
        while byte := os.read(self._read, 1):
            if byte[0] not in SIGNALS:
                continue
            name = signal.Signals(byte[0]).name
            if byte[0] == signal.SIGHUP and self._came:  # a shell may send it once more
                continue
            if self._came:
                with contextlib.suppress(OSError):
                    os.write(
                        sys.stderr.fileno(),
                        f"\n{name} again: stopping at once, nothing more is saved.\n".encode(),
                    )
                    if os.isatty(sys.stdout.fileno()):  # where a progress bar hid it
                        os.write(sys.stdout.fileno(), SHOW_CURSOR)
                os._exit(128 + byte[0])
            self._came = True
            print(
                f"\n{name}: saving what there is, then leaving; a second signal stops at once.",
                file=sys.stderr,
                flush=True,
            )
        os.close(self._read)

    def check(self) -> None:
        """Raises KeyboardInterrupt where a signal came before there is anything to save.

        Python's own KeyboardInterrupt would be lost where it is raised inside a callback of XLA.
        """
        if self.requested():
            raise KeyboardInterrupt

    def requested(self) -> bool:
        """True once a signal came; with several processes, once it came to any of them, and to all at the same step."""
        import jax  # which takes a second: signals are to be heeded before
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return self._came
        return bool(multihost_utils.process_allgather(np.array(self._came)).any())
