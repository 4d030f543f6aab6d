"""Find out by which code, and on which machine, a result is made."""

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

# The SHA-256 of each experiment's file that this process ran, by name: it may hold own code.
experiment_files: dict[str, str] = {}


def provenance() -> dict:
    """Return versions, CPU cores, commit, experiment_files, and what of ENVIRONMENT is set."""
    versions = {name: importlib.metadata.version(package) for name, package in PACKAGES.items()}
    return dict(
        versions=versions | dict(python=platform.python_version()),
        host_cores=os.cpu_count(),
        commit=commit(),
        experiment_files=dict(experiment_files),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )


def other_code(before: dict) -> str:
    """Say how the code differs from that of `before`, a provenance or summary; "": not at all."""
    files, old, new = before.get("experiment_files") or {}, before.get("commit"), commit()
    changed = [
        f"{name} was edited"
        for name, digest in experiment_files.items()
        if files.get(name, digest) != digest
    ]
    if old and new and old != new:
        changed.append(f"commit {old[:10]}{old[40:]} -> {new[:10]}{new[40:]}")
    return ", ".join(changed)


def command() -> str | None:
    """Return the command that repeats this run in a new workdir.

    That is launch.py's, without --workdir. None for a run that launch.py did not start.
    """
    if pathlib.Path(sys.argv[0]).name != "launch.py":
        return None
    return f"python launch.py {shlex.join(without(sys.argv[1:], {'workdir'}))}"


def without(arguments: list[str], names: set[str]) -> list[str]:
    """Return launch.py's arguments without the flags of these names and their values."""
    rest = []
    value_follows = False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if value_follows:
            value_follows = False
        elif argument.startswith("-") and name in names:
            value_follows = not equals
        else:
            rest.append(argument)
    return rest


def commit() -> str | None:
    """Return the commit of this code; None if it is unknown.

    The environment variable COMMIT names it for code that was copied without its history.
    Otherwise git does, and adds -dirty where tracked files differ from the commit.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    if not shutil.which("git"):
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = pathlib.Path(__file__).parent
    described = subprocess.run(describe, capture_output=True, text=True, cwd=folder, check=False)
    return described.stdout.strip() or None
