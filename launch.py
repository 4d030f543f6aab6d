"""Command line of cnn_spmd.

  python launch.py --config experiments/alexnet_cifar.py                       train, on every device there is
  python launch.py --config experiments/alexnet_cifar.py --mesh 4x2            data=4, model=2
  python launch.py --config ... --mesh all --sweep parallelism=data,hybrid     a sweep; 8x1,4x2 is one, too
  python launch.py --config ... --mesh 1x1,4x1 --batch_per_device 32,128       a sweep of global batches that grow with the mesh
  python launch.py --config ... --config.optimizer.learning_rate=0.02          any field
  python launch.py --config ... --cpu_devices 8                                simulate 8 devices on the CPU
  python launch.py --config ... --workdir runs/a                               the same workdir again resumes
  python launch.py --config ... --dry_run                                      compile, print the report, stop
  python launch.py --config ... --dry_run --target h100:64x8                   the same for 64 hosts of 8 GPUs each

Several hosts: the same command on each, with JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID set,
or under Slurm's srun or Open MPI's mpirun.

Exit codes: 0 done; 1 a crash, or a sweep of which not every run is completed; 2 bad input, or a sweep of which every run is
refused; 3 the loss is not finite; 75 interrupted (what resumes is printed, if anything was saved).
"""

import datetime
import errno
import os
import pathlib
import shlex
import signal
import subprocess
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cnn_spmd import config as configs
from cnn_spmd import interrupt
from cnn_spmd.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: experiments/NAME.py, or NAME.py:VARIANT. Its fields are "
                                         "set with --config.FIELD=VALUE.", lock_config=True)
MESH = flags.DEFINE_string("mesh", None, "Mesh shape DATAxMODEL, such as 4x2; sets config.mesh. Several, joined by commas, are "
                           "a sweep; 'all' is 1x1 and every shape of all the devices.")
SWEEP = flags.DEFINE_multi_string("sweep", [], "A config field and its values, such as parallelism=data,hybrid or seed=0,1,2; "
                                  "several are crossed with each other and with the meshes.")
BATCH_PER_DEVICE = flags.DEFINE_string("batch_per_device", None, "Sweep config.batch_size as these numbers, joined by commas, "
                                       "times the devices of the mesh.")
PROFILE = flags.DEFINE_integer("profile", None, "After the last step, trace this many more (whole calls, whose results are "
                               "thrown away): top kernels and communication go to profile.json.", lower_bound=1)
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "Simulate this many devices on the CPU.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; an existing run resumes. Default: "
                              "runs/<experiment>-<UTC time>.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile, print placement, memory and collectives, and stop; with "
                            "--workdir, also write them there as program.json.")
TARGET = flags.DEFINE_string("target", None, "With --dry_run: compile for GPUs that are not here, such as h100:64x8.")

CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
BAD_INPUT, NON_FINITE, INTERRUPTED = 2, 3, 75  # 75 is EX_TEMPFAIL of sysexits.h


def start_cluster() -> None:
    """Joins the cluster that the environment names, if any; raises where that fails or gives fewer processes.

    Without this a process that fails to join would train a copy of its own.
    """
    import jax

    env = os.environ
    if any(name in env for name in CLUSTER):
        address, count, number = (env.get(name, "") for name in CLUSTER)
        if ":" not in address or not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise ValueError(", ".join(f"{name}={env.get(name, '')}" for name in CLUSTER) + ": expected host:port, a number "
                             "and one below it, all three")
        expected = int(env["JAX_NUM_PROCESSES"])
        where = dict(coordinator_address=env["JAX_COORDINATOR_ADDRESS"], num_processes=expected,
                     process_id=int(env["JAX_PROCESS_ID"]))
    else:
        expected = max(int(env.get(name) or 1) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
        if expected == 1:
            return
        where = {}  # jax finds the coordinator itself under Slurm and Open MPI
    timeout = int(env.get("JAX_INITIALIZATION_TIMEOUT", 120))
    try:
        jax.distributed.initialize(**where, initialization_timeout=timeout)
    except ValueError as error:
        started = "" if where else (" Expected srun or mpirun to have started this process, as SLURM_NTASKS or "
                                    "OMPI_COMM_WORLD_SIZE is above 1")
        raise ValueError(f"{' '.join(str(error).split())}{started}") from error
    if jax.process_count() != expected:
        raise RuntimeError(f"the cluster has {jax.process_count()} processes, expected {expected}")


def main(argv: list[str]) -> int:
    for number in interrupt.SIGNALS:  # until the run takes over
        signal.signal(number, interrupt.early)
    try:
        return launch(argv)
    except KeyboardInterrupt:
        print("Interrupted outside of the training loop: nothing to save.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: --workdir={WORKDIR.value or 'runs'}: {error.strerror}: make room, and give the same command with that "
              "folder again", file=sys.stderr)
        return 1


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
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)  # the report reads a program's op_names
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cnn_spmd"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if SWEEP.value or BATCH_PER_DEVICE.value is not None or "," in (MESH.value or "") or MESH.value == "all":
        return launch_sweep()
    try:
        start_cluster()
    except Exception as error:
        logging.error("Cannot join the cluster: %s", error)
        return 1

    from cnn_spmd import mesh, target, train
    try:
        config = CONFIG.value
        if MESH.value is not None:
            config.mesh.data, config.mesh.model = mesh.parse(MESH.value)
        config.profile = PROFILE.value or config.profile
        workdir = WORKDIR.value and pathlib.Path(WORKDIR.value).expanduser()
        if DRY_RUN.value:
            report = train.dry_run(config, workdir, target.devices(TARGET.value) if TARGET.value else None)
            if "error" in report:
                print(f"error: there is no whole report: {report['error']}", file=sys.stderr)
            return int("error" in report)
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


def launch_sweep() -> int:
    """A sweep over what the flags name; 0 where every run is completed."""
    import jax

    from cnn_spmd import report, sweep
    if DRY_RUN.value:
        return refuse("--dry_run: expected a single mesh with it, and no --sweep")
    if several := [name for name in CLUSTER if name in os.environ]:
        return refuse(f"{several[0]} is set: a sweep runs on one host, expected a single run")
    count = CPU_DEVICES.value
    if not count:  # counted in a process that ends: this one must leave the devices to the runs
        counted = subprocess.run([sys.executable, "-c", "import jax; print(jax.device_count())"], stdout=subprocess.PIPE,
                                 text=True, check=True)
        count = int(counted.stdout)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    folder = pathlib.Path(WORKDIR.value or default_workdir(f"{CONFIG.value.experiment}-sweep")).expanduser()
    try:
        combos = sweep.combinations(MESH.value, BATCH_PER_DEVICE.value, SWEEP.value, count)
        shared = without(flags.FLAGS.read_flags_from_files(sys.argv[1:]), {"mesh", "sweep", "batch_per_device", "workdir"})
        result = sweep.run(CONFIG.value.experiment, shared, combos, jax.devices(), CPU_DEVICES.value, folder)
        for path in report.write([folder]):
            print(path)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        again = sys.argv if WORKDIR.value else [*sys.argv, "--workdir", str(folder)]
        print(f"Interrupted. To go on: python {shlex.join(again)}")
        return INTERRUPTED
    statuses = [run["status"] for run in result["runs"]]
    print(f"{statuses.count('completed')} of {len(statuses)} runs are completed. Files: {folder}")
    return 0 if set(statuses) == {"completed"} else BAD_INPUT if set(statuses) == {"refused"} else 1


def without(arguments: list[str], names: set[str]) -> list[str]:
    """The arguments without the flags of these names and their values."""
    kept, value_follows = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if value_follows:
            value_follows = False
        elif argument.startswith("-") and name in names:
            value_follows = not equals
        else:
            kept.append(argument)
    return kept


def default_workdir(experiment: str) -> str:
    """runs/<experiment>-<UTC time to the microsecond>, the same on every process of a cluster.

    Runs that a script starts at once share their millisecond now and then.
    """
    import numpy as np
    from jax.experimental import multihost_utils

    now = datetime.datetime.now(datetime.UTC)
    digits = np.array([int(f"{now:%Y%m%d}"), int(f"{now:%H%M%S}"), now.microsecond], np.int32)
    date, clock, microseconds = multihost_utils.broadcast_one_to_all(digits)
    return f"runs/{experiment}-{date:08d}-{clock:06d}-{microseconds:06d}"


def refuse(reason: object) -> int:
    """Prints bad input as one line; returns its exit code."""
    print(f"error: {reason}", file=sys.stderr)
    return BAD_INPUT


def parse(argv: list[str]) -> list[str]:
    """The flags of the command line; bad ones end the program with one line."""
    try:
        return configs.parse_flags(flags.FLAGS, argv)
    except UserError as error:
        sys.exit(refuse(error))


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
