"""Keep a program's surroundings from ending it, changing its numbers, or repeating its warnings."""

import atexit
import errno
import io
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import warnings

from absl import flags
from absl import logging as absl_logging

from cnn_spmd.errors import UserError

# jax's settings that change a run's numbers, or refuse its code, at jax's own defaults. Each has an
# environment variable of the same name.
NUMBERS = dict(
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


class _Lossy(io.FileIO):
    """A descriptor that loses what it cannot write, where a pipe has no reader for example.

    TextIOWrapper takes it without a buffer between, as under `python -u`: a KeyboardInterrupt inside
    `write` would make the buffer write twice.
    """

    error: OSError | None = (
        None  # the last one that is no broken pipe, which has no reader to miss it
    )

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[super().write(rest) or len(rest) :]  # None: full, and does not block
        except BrokenPipeError:
            pass
        except OSError as error:
            self.error = error
        return len(data)


def keep_talking() -> None:
    """Replace sys.stdout and sys.stderr by streams that take any text and never raise."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file that is opened must not get its number
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        if name != "stdin":
            raw = _Lossy(descriptor, "w", closefd=False)
            raw.error = None if stream else OSError(errno.EBADF, os.strerror(errno.EBADF))
            encoding = stream.encoding if stream else "utf-8"
            setattr(
                sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
            )


def unwritten() -> int:
    """Return the exit code of a command that only prints; say on stderr what stdout has lost."""
    sys.stdout.flush()
    error = getattr(getattr(sys.stdout, "buffer", None), "error", None)
    if error is None:
        return 0
    print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
    return 1


def prepare() -> None:
    """Set what a command of launch.py needs, before jax computes anything.

    Raises UserError where a variable of the environment lets jax not even be imported.
    """
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise UserError(
            f"jax cannot be imported: {' '.join(str(error).split())}: mend or unset that variable"
        ) from None
    warn_once()
    find_home()
    fix_numbers()
    keep_programs()


def warn_once() -> None:
    """Let absl alone print what libraries log, TFDS's hints left out, each as one line."""
    flags.FLAGS.set_default("logtostderr", True)  # the stderr of that moment, above a progress bar
    for library in ("jax", "jaxlib"):
        logging.getLogger(library).handlers.clear()  # JAX_LOGGING_LEVEL adds a second one
    logging.getLogger("absl").addFilter(
        lambda record: (
            record.levelno >= logging.ERROR or "tensorflow_datasets" not in record.pathname
        )
    )
    warnings.formatwarning = lambda message, category, file, line, _=None: (
        f"{category.__name__}: {' '.join(str(message).split())} ({file}:{line})\n"
    )


def find_home() -> None:
    """Make a HOME for this process where there is none, for the caches of all libraries."""
    if os.environ.get("TFDS_DATA_DIR") == "":  # TFDS would take it for the current folder
        del os.environ["TFDS_DATA_DIR"]
    try:
        if os.environ.get("HOME") != "" and pathlib.Path.home().is_dir():
            return
    except (RuntimeError, OSError):  # no HOME and no such user; a parent that cannot be read
        pass
    os.environ["HOME"] = tempfile.mkdtemp(prefix="cnn_spmd-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
    absl_logging.warning(
        "There is no home directory: compiled programs, and data sets without "
        "TFDS_DATA_DIR, are kept for this command only."
    )


def fix_numbers() -> None:
    """Set back what would change a run's numbers and stand in none of its files, with a warning."""
    import jax

    for name, value in NUMBERS.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)
            absl_logging.warning(
                "%s=%s has no effect: it is %s, so that the same command gives the same numbers.",
                name.upper(),
                os.environ.get(name.upper()),
                value,
            )


def keep_programs() -> None:
    """Let jax keep compiled programs in a cache folder, or warn where it cannot be written."""
    import jax

    # The report reads a program's op_names.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cnn_spmd"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            jax.config.update("jax_compilation_cache_dir", str(cache))
    except OSError as error:
        absl_logging.warning("%s: %s: compiled programs are not kept.", cache, error.strerror)
