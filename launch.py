"""Command line of cnn_spmd.

  python launch.py --config experiments/alexnet_cifar.py                       train, on every device there is
  python launch.py --config experiments/alexnet_cifar.py --mesh 4x2            data=4, model=2
  python launch.py --config ... --config.optimizer.learning_rate=0.02          any field
  python launch.py --config ... --cpu_devices 8                                simulate 8 devices on the CPU
  python launch.py --config ... --workdir runs/a                               the same workdir again resumes
  python launch.py --config ... --dry_run                                      compile, print the report, stop
  python launch.py --config ... --dry_run --target h100:64x8                   the same for 64 hosts of 8 GPUs each

Several hosts: the same command on each, with JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID set,
or under Slurm's srun or Open MPI's mpirun.

Exit codes: 0 done; 1 a crash; 2 bad input; 3 the loss is not finite; 75 interrupted and saved, the same command resumes.
"""

import datetime
import os
import pathlib
import shlex
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: experiments/NAME.py, or NAME.py:VARIANT. Its fields are "
                                         "set with --config.FIELD=VALUE.", lock_config=True)
MESH = flags.DEFINE_string("mesh", None, "Mesh shape DATAxMODEL, such as 4x2; sets config.mesh.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "Simulate this many devices on the CPU.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; an existing run resumes. Default: "
                              "runs/<experiment>-<UTC time>.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile, print placement, memory and collectives, and stop; with "
                            "--workdir, also write them there as program.json.")
TARGET = flags.DEFINE_string("target", None, "With --dry_run: compile for GPUs that are not here, such as h100:64x8.")

BAD_INPUT, NON_FINITE, INTERRUPTED = 2, 3, 75  # 75 is EX_TEMPFAIL of sysexits.h


def start_cluster() -> None:
    """Joins the cluster that the environment names, if any; raises where that fails or gives fewer processes.

    Without this a process that fails to join would train a copy of its own.
    """
    import jax

    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        missing = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if not env.get(name, "").isdecimal()]
        if missing:
            raise ValueError(f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} is no number: set all three")
        expected = int(env["JAX_NUM_PROCESSES"])
        where = dict(coordinator_address=env["JAX_COORDINATOR_ADDRESS"], num_processes=expected,
                     process_id=int(env["JAX_PROCESS_ID"]))
    else:
        expected = max(int(env.get(name) or 1) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
        if expected == 1:
            return
        where = {}  # jax finds the coordinator itself under Slurm and Open MPI
    jax.distributed.initialize(**where, initialization_timeout=int(env.get("JAX_INITIALIZATION_TIMEOUT", 120)))
    if jax.process_count() != expected:
        raise RuntimeError(f"the cluster has {jax.process_count()} processes, expected {expected}")


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # until the run takes over
    try:
        return launch(argv)
    except KeyboardInterrupt:
        print("Interrupted outside of the training loop: nothing to save.", file=sys.stderr)
        return INTERRUPTED


def launch(argv: list[str]) -> int:
    if TARGET.value:  # both before jax is imported
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of each save in thirty lines
    if len(argv) > 1:
        return refuse(f"unexpected argument {argv[1]!r}: flags start with --, see --help")
    if WORKDIR.value == "":
        return refuse("--workdir=: is empty, expected a folder")
    if TARGET.value and not DRY_RUN.value:
        return refuse(f"--target={TARGET.value}: those GPUs are not here, expected --dry_run with it")
    if CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
    try:
        start_cluster()
    except Exception as error:
        logging.error("Cannot join the cluster: %s", error)
        return 1

    from cnn_spmd import mesh, target, train
    from cnn_spmd.errors import UserError
    try:
        config = CONFIG.value
        if MESH.value is not None:
            config.mesh.data, config.mesh.model = mesh.parse(MESH.value)
        workdir = WORKDIR.value and pathlib.Path(WORKDIR.value).expanduser()
        if DRY_RUN.value:
            train.dry_run(config, workdir, target.devices(TARGET.value) if TARGET.value else None)
            return 0
        workdir = workdir or pathlib.Path(default_workdir(config.experiment))
        summary = train.run(config, workdir)
    except UserError as error:
        return refuse(error)
    except train.NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return NON_FINITE
    if summary["status"] == "interrupted":
        again = sys.argv if WORKDIR.value else [*sys.argv, "--workdir", str(workdir)]
        print(f"Interrupted and saved at step {summary['steps']}. To resume: python {shlex.join(again)}")
        return INTERRUPTED
    print(f"Done: {summary['dataset']} test accuracy {summary['eval']['accuracy']:.2%} after {summary['steps']} steps, "
          f"{summary['train_seconds']:.1f} s of training. Files: {workdir}")
    return 0


def default_workdir(experiment: str) -> str:
    """runs/<experiment>-<UTC time to the millisecond>, the same on every process of a cluster."""
    import numpy as np
    from jax.experimental import multihost_utils

    now = datetime.datetime.now(datetime.UTC)
    digits = np.array([int(f"{now:%Y%m%d}"), int(f"{now:%H%M%S}"), now.microsecond // 1000], np.int32)
    date, clock, milliseconds = multihost_utils.broadcast_one_to_all(digits)
    return f"runs/{experiment}-{date:08d}-{clock:06d}-{milliseconds:03d}"


def refuse(reason: object) -> int:
    """Prints bad input as one line; returns its exit code."""
    print(f"error: {reason}", file=sys.stderr)
    return BAD_INPUT


def parse(argv: list[str]) -> list[str]:
    """absl's flag parser, with every refusal as one line: unknown flags and fields, wrong types, missing experiments."""
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS.config is None:
            raise flags.Error("--config is missing: give an experiment, such as --config experiments/alexnet_cifar.py")
        flags.FLAGS.config.experiment  # noqa: B018  (a config file that is not there raises at its first use)
    except OSError:
        folder = pathlib.Path(__file__).parent / "experiments"
        known = ", ".join(sorted(f"experiments/{path.name}" for path in folder.glob("*.py")))
        sys.exit(refuse(f"--config={flags.FLAGS['config'].config_filename}: no such experiment, expected one of {known}"))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        text = str(error.args[0] if error.args else error).strip()
        if "Error whilst parsing config file" in text:  # a traceback, with the reason last
            text = text.splitlines()[-1].removeprefix("ValueError: ")
        elif isinstance(error, KeyError | AttributeError):
            text = "no such config field: " + text
        sys.exit(refuse(" ".join(text.split())))
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
