"""Find out by which code, and on which machine, a result is made."""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys

PACKAGES = dict(jax="jax", jaxlib="jaxlib", flax="flax", optax="optax", orbax="orbax-checkpoint")
ENVIRONMENT = ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")  # these may change the last digits of a run


def provenance() -> dict:
    """Return versions, CPU cores, commit, and which of ENVIRONMENT are set to what."""
    versions = {name: importlib.metadata.version(package) for name, package in PACKAGES.items()}
    return dict(
        versions=versions | dict(python=platform.python_version()),
        host_cores=os.cpu_count(),
        commit=commit(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )


def command() -> str | None:
    """Return the command that repeats this run in a new workdir.

    That is launch.py's, without --workdir. None for a run that launch.py did not start.
    """
    if pathlib.Path(sys.argv[0]).name != "launch.py":
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", "-workdir")
    _, others = parser.parse_known_args(sys.argv[1:])
    return f"python launch.py {shlex.join(others)}"


def commit() -> str | None:
    """Return the commit of this code; None if it is unknown.

    The environment variable COMMIT names it for code that was copied without its history.
    Otherwise git does, and adds -dirty where tracked files differ from the commit.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    if not shutil.which("git"):
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
        check=False,
    )
    return described.stdout.strip() or None
