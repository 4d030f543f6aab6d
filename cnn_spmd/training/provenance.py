"""Find out by which code, and on which machine, a result is made."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess

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
