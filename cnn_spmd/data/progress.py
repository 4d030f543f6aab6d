"""Show how far a long preparation is, on the standard error stream."""

import os
import sys
import time

from rich import console, progress

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


def print_note(text: str) -> None:
    """Print a line on the standard error stream; a progress bar stays below it."""
    print(text, file=sys.stderr, flush=True)  # rich redirects sys.stderr while it shows a bar


def clock_text(seconds: float) -> str:
    """Return 1:02:03 for 3723 seconds, and 2:03 for 123."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class Progress:
    """Show the progress of decoding images.

    On a terminal this is a bar, otherwise a line every PLAIN_SECONDS. Rates and the remaining time
    count only images that this process decodes.
    """

    def __init__(self, total: int, kept: int):
        """Start at `kept` of `total` images, which an earlier process has decoded."""
        self.total, self.kept, self.new = total, kept, 0
        self._started = self._updated = self._shown = time.monotonic()
        self._bar = progress.Progress(
            progress.TextColumn("{task.completed:,}/{task.total:,} images"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=console.Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total, completed=kept, text="")

    def update(self, new: int) -> None:
        """Show that `new` more images are decoded, or found to be unreadable."""
        if not self.new:  # so far, images of an earlier process were compared with their digests
            self._started = self._updated
        self._updated = time.monotonic()
        self.new += new
        if not self.new:
            return
        done = min(self.kept + self.new, self.total)
        eta = (self.total - done) * (self._updated - self._started) / self.new
        text = f"{self._rates()}, ETA {clock_text(eta)}"
        self._bar.update(self._task, completed=done, text=text)
        if self._bar.disable and self._updated - self._shown > PLAIN_SECONDS:
            self._shown = self._updated
            print_note(f"prepared {done:,} of {self.total:,} images, {text}")

    def close(self) -> None:
        """Remove the bar, and print how many images were decoded, and at which rate."""
        self._bar.stop()
        if self.new:
            seconds = self._updated - self._started
            print_note(f"prepared {self.new:,} images in {seconds:,.1f} s, {self._rates()}")

    def _rates(self) -> str:
        rate = self.new / (self._updated - self._started)
        return f"{rate:,.0f} per second ({rate / cores():,.0f} per core)"
