"""Protect a command from its surroundings.

Streams may be closed and pipes full. Environment variables may change a run's numbers, or be such
that jax refuses them. The home directory may be missing. Libraries print the same warning twice.
"""

import argparse
import atexit
import errno
import io
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging

from cnn_spmd.errors import UserError

# The jax settings that change a run's numbers, or let its code fail, with jax's own defaults. Each
# can be set by an environment variable of its name in capitals.
JAX_DEFAULTS = dict(
    jax_enable_x64=False,
    jax_default_prng_impl="threefry2x32",
    jax_threefry_partitionable=True,
    jax_random_seed_offset=0,
    jax_default_matmul_precision=None,
    jax_numpy_dtype_promotion="standard",
    jax_numpy_rank_promotion="allow",
    jax_disable_jit=False,
    jax_transfer_guard=None,
    jax_default_device=None,
)


class _LossyFile(io.FileIO):
    """A file that drops what it cannot write, as when a pipe has no reader.

    TextIOWrapper writes to it directly, without a buffer, as under `python -u`. With a buffer, a
    KeyboardInterrupt inside `write` would make the buffer write twice.
    """

    # The last error, if it was no broken pipe: a pipe without a reader misses nothing.
    error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write what can be written, and return the length of `data`."""
        rest = memoryview(data)
        try:
            while rest:
                # FileIO.write returns None if a non-blocking descriptor is full.
                rest = rest[super().write(rest) or len(rest) :]
        except BrokenPipeError:
            pass
        except OSError as error:
            self.error = error
        return len(data)


def protect_streams() -> None:
    """Replace stdout and stderr by streams that accept any text and never raise.

    What is logged goes to stderr, as `print_plain_lines` says.
    """
    print_plain_lines()
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed: otherwise the next file to be opened would get its number
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        if name == "stdin":
            continue
        raw = _LossyFile(descriptor, "w", closefd=False)
        raw.error = None if stream else OSError(errno.EBADF, os.strerror(errno.EBADF))
        encoding = stream.encoding if stream else "utf-8"
        protected = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, protected)


class _PlainFormatter(logging.Formatter):
    """Write a record as `warning: TEXT`, as every other notice of a command."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        return f"{record.levelname.lower()}: {record.message}"


def print_plain_lines() -> None:
    """Let absl print what is logged, by us and by libraries, in plain lines on stderr."""
    # absl then writes to sys.stderr as it is at that moment, which is above a progress bar.
    flags.FLAGS.set_default("logtostderr", True)
    flags.FLAGS.mark_as_parsed()  # absl has a line of its own for commands without absl's flags
    absl_logging.get_absl_handler().setFormatter(_PlainFormatter())
    absl_logging.use_absl_handler()


class Parser(argparse.ArgumentParser):
    """The parser of `python -m cnn_spmd.NAME`, whose errors are of one line, by exit_code_of."""

    def __init__(self, name: str, description: str, **settings: object):
        """description: a text of several lines is shown as it is. settings: as of argparse."""
        is_laid_out = "\n" in description
        formatter = argparse.RawDescriptionHelpFormatter if is_laid_out else argparse.HelpFormatter
        super().__init__(
            f"python -m cnn_spmd.{name}",
            description=description,
            formatter_class=formatter,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see --help")


def exit_code_of(command: Callable[[], None]) -> int:
    """Run a command, print a known error as one line, and return the exit code.

    0: done; 1: the output could not be written; 2: bad input; 130: Ctrl-C.
    """
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return exit_code_of_output()


def exit_code_of_output() -> int:
    """Return 0, or 1 if stdout lost anything; then print an error to stderr."""
    sys.stdout.flush()
    error = getattr(getattr(sys.stdout, "buffer", None), "error", None)
    if error is None:
        return 0
    print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
    return 1


def prepare() -> None:
    """Prepare the process for a command of launch.py, before it uses jax.

    Raises UserError if an environment variable keeps jax from being imported, or XLA from starting.
    """
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise UserError(
            f"jax cannot be imported: {' '.join(str(error).split())}: mend or unset that variable"
        ) from None
    refuse_bad_xla_flags()
    print_each_warning_once()
    ensure_home()
    reset_jax_settings()
    cache_programs()


def refuse_bad_xla_flags() -> None:
    """Raise UserError if XLA cannot read the variable XLA_FLAGS.

    XLA would end this process with pages of text. So another process reads the variable
    first.
    """
    if "XLA_FLAGS" not in os.environ:
        return
    code = "from jaxlib import _jax; _jax.CompileOptions().executable_build_options.debug_options"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # A line of XLA's log: E or F for error or fatal, month and day, time, thread, file, text.
    reason = re.search(r"^[EF]\d{4} \S+ +\d+ \S+flags\S*\] (.*)", result.stderr, re.MULTILINE)
    if result.returncode and reason:
        raise UserError(
            f"XLA_FLAGS={os.environ['XLA_FLAGS']}: {reason[1].rstrip('.')}: mend or unset that "
            "variable"
        )


def print_each_warning_once() -> None:
    """Let only absl print what libraries log, in single lines, without TFDS's hints."""
    for library in ("jax", "jaxlib"):
        logging.getLogger(library).handlers.clear()  # JAX_LOGGING_LEVEL adds a second handler
    logging.getLogger("absl").addFilter(
        lambda record: (
            record.levelno >= logging.ERROR or "tensorflow_datasets" not in record.pathname
        )
    )
    warnings.formatwarning = lambda message, category, file, line, _=None: (
        f"{category.__name__}: {' '.join(str(message).split())} ({file}:{line})\n"
    )


def ensure_home() -> None:
    """Make a temporary home if there is none: libraries keep their caches there."""
    if os.environ.get("TFDS_DATA_DIR") == "":  # TFDS would use the current folder
        del os.environ["TFDS_DATA_DIR"]
    try:
        if os.environ.get("HOME") != "" and pathlib.Path.home().is_dir():
            return
    except (RuntimeError, OSError):  # no HOME and no such user; or a parent that cannot be read
        pass
    os.environ["HOME"] = tempfile.mkdtemp(prefix="cnn_spmd-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
    absl_logging.warning(
        "There is no home directory: compiled programs, and data sets without "
        "TFDS_DATA_DIR, are kept for this command only."
    )


def reset_jax_settings() -> None:
    """Reset jax settings that change numbers and that no file of a run records; warn."""
    import jax

    for name, default in JAX_DEFAULTS.items():
        if getattr(jax.config, name) != default:
            jax.config.update(name, default)
            absl_logging.warning(
                "%s=%s has no effect: it is %s, so that the same command gives the same numbers.",
                name.upper(),
                os.environ.get(name.upper()),
                default,
            )


def cache_programs() -> None:
    """Let jax keep compiled programs in a cache folder; warn if it cannot be written."""
    import jax

    # The report reads the op_names in a program. By default, programs that differ only in these
    # share an entry of the cache.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    # The lines of code that made a program are such metadata, too. They would give it other keys in
    # a sweep's worker, and after each edit.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # By default, programs that compile within a second are compiled again by each command.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cnn_spmd"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            jax.config.update("jax_compilation_cache_dir", str(cache))
    except OSError as error:
        absl_logging.warning(
            "%s: %s: compiled programs are not cached; make the folder writable, or set "
            "JAX_COMPILATION_CACHE_DIR to another one.",
            cache,
            error.strerror,
        )


# ---- Devices


def simulate(devices: int) -> None:
    """Let jax take this many simulated devices on the CPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def device_count() -> int:
    """Count the devices.

    Raises UserError where JAX_PLATFORMS names one that is not here.
    """
    import jax

    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "there is no such device"
        raise UserError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}") from None
