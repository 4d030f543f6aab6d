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

Exit codes: 0 done; 1 a crash, a process of the cluster that is absent or lost, or a sweep of which not every run is completed;
2 bad input, or a sweep of which every run is refused; 3 the loss is not finite; 75 interrupted (what resumes is printed, if
anything was saved).
"""

import concurrent.futures
import datetime
import errno
import multiprocessing
import os
import shlex
import signal
import sys

from absl import app, flags, logging

from cnn_spmd import config as configs
from cnn_spmd.errors import UserError
from cnn_spmd.report import write
from cnn_spmd.training import cluster, environment, interrupt

CONFIG = configs.define_flag(flags.FLAGS)
MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Mesh shape DATAxMODEL, such as 4x2; sets config.mesh. Several, joined by commas, are "
    "a sweep; 'all' is 1x1 and every shape of all the devices.",
)
SWEEP = flags.DEFINE_multi_string(
    "sweep",
    [],
    "A config field and its values, such as parallelism=data,hybrid or seed=0,1,2; "
    "several are crossed with each other and with the meshes.",
)
BATCH_PER_DEVICE = flags.DEFINE_string(
    "batch_per_device",
    None,
    "Sweep config.batch_size as these numbers, joined by commas, times the devices of the mesh.",
)
PROFILE = flags.DEFINE_integer(
    "profile",
    None,
    "After the last step, trace this many more (whole calls, whose results are "
    "thrown away): top kernels and communication go to profile.json.",
    lower_bound=1,
)
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "Simulate this many devices on the CPU.",
    lower_bound=1,
    upper_bound=configs.MOST_CPU_DEVICES,
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; an existing run resumes. Default: runs/<experiment>-<UTC time>.",
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Compile, print placement, memory and collectives, and stop; with "
    "--workdir, also write them there as program.json.",
)
TARGET = flags.DEFINE_string(
    "target", None, "With --dry_run: compile for GPUs that are not here, such as h100:64x8."
)

BAD_INPUT, NON_FINITE, INTERRUPTED = 2, 3, 75  # 75 is EX_TEMPFAIL of sysexits.h


def main(argv: list[str]) -> int:
    for number in interrupt.SIGNALS:  # until the run takes over
        signal.signal(number, interrupt.handle_early_signal)
    try:
        code = launch(argv)
        cluster.leave()
        return code
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        cluster.fail("Interrupted outside of the training loop: nothing to save.", INTERRUPTED)
        return INTERRUPTED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            line = (
                f"--workdir={WORKDIR.value or 'runs'}: {error.strerror}: make room, and give the same command with that "
                "folder again"
            )
        elif error.filename is not None:
            line = f"{os.fsdecode(error.filename)}: {error.strerror}: mend it, and give the same command again"
        else:
            cluster.crash(error)
            raise
        cluster.fail(f"error: {line}", 1)
        return 1
    except Exception as error:
        cluster.crash(error)
        raise


def launch(argv: list[str]) -> int:
    if TARGET.value:  # both before jax is imported
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of each save in thirty lines
    environment.prepare()
    import jax

    if len(argv) > 1:
        return refuse(f"unexpected argument {argv[1]!r}: flags start with --, see --help")
    if WORKDIR.value == "":
        return refuse("--workdir=: is empty, expected a folder")
    if TARGET.value and not DRY_RUN.value:
        return refuse(
            f"--target={TARGET.value}: those GPUs are not here, expected --dry_run with it"
        )
    if CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
    if (
        SWEEP.value
        or BATCH_PER_DEVICE.value is not None
        or "," in (MESH.value or "")
        or MESH.value == "all"
    ):
        if name := cluster.named(os.environ):  # no other process waits for this one
            print(
                f"error: {name}={os.environ[name]}: a sweep runs in one process, expected a single run, or srun's "
                "or mpirun's variables unset",
                file=sys.stderr,
            )
            return BAD_INPUT
        return launch_sweep()

    from cnn_spmd.analysis import target
    from cnn_spmd.sharding import mesh
    from cnn_spmd.training import checkpoint, loop
    from cnn_spmd.training import workdir as workdirs
    from cnn_spmd.training.dry_run import dry_run
    from cnn_spmd.training.provenance import provenance
    from cnn_spmd.training.terminal import say

    cluster.join()
    device_count()
    config = CONFIG.value
    if MESH.value is not None:
        config.mesh.data, config.mesh.model = mesh.parse(MESH.value)
    config.profile = PROFILE.value or config.profile
    if cluster.named(os.environ):
        given = {f"--{flag.name} given": bool(flag.value) for flag in (WORKDIR, DRY_RUN, TARGET)}
        code = {name: value for name, value in provenance().items() if name != "host_cores"}
        cluster.agree(given | code | dict(config=configs.as_json(config)))
        say(cluster.size())
    workdir = WORKDIR.value and workdirs.parse(WORKDIR.value)
    if DRY_RUN.value:
        report = dry_run(config, workdir, target.devices(TARGET.value) if TARGET.value else None)
        if "error" in report:
            print(f"error: there is no whole report: {report['error']}", file=sys.stderr)
        return int("error" in report)
    workdir = workdir or workdirs.parse(default_workdir(config.experiment))
    try:
        summary = loop.train(config, workdir)
    except checkpoint.SaveError as error:
        cluster.fail(f"error: {error}", 1)
        return 1
    except loop.NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return NON_FINITE
    if summary["status"] == "interrupted":
        again = sys.argv if WORKDIR.value else [*sys.argv, "--workdir", str(workdir)]
        print(
            f"Interrupted and saved at step {summary['steps']}. To resume: python {shlex.join(again)}"
        )
        return INTERRUPTED
    print(
        f"Done: {summary['dataset']} test accuracy {summary['eval']['accuracy']:.2%} after {summary['steps']} steps, "
        f"{summary['train_seconds']:.1f} s of training. Files: {workdir}"
    )
    return 0


def launch_sweep() -> int:
    """A sweep over what the flags name; 0 where every run is completed."""
    import jax

    from cnn_spmd import sweep
    from cnn_spmd.training import workdir as workdirs

    if DRY_RUN.value:
        return refuse("--dry_run: expected a single mesh with it, and no --sweep")
    count = CPU_DEVICES.value
    if not count:  # counted in a process that ends: this one must leave the devices to the runs
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as pool:
            count = pool.submit(device_count).result()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    folder = workdirs.parse(WORKDIR.value or default_workdir(f"{CONFIG.value.experiment}-sweep"))
    try:
        combos = sweep.combinations(MESH.value, BATCH_PER_DEVICE.value, SWEEP.value, count)
        shared = without(
            flags.FLAGS.read_flags_from_files(sys.argv[1:]),
            {"mesh", "sweep", "batch_per_device", "workdir"},
        )
        result = sweep.run(
            CONFIG.value.experiment, shared, combos, jax.devices(), CPU_DEVICES.value, folder
        )
        for path in write.write([folder]):
            print(path)
    except KeyboardInterrupt:
        again = sys.argv if WORKDIR.value else [*sys.argv, "--workdir", str(folder)]
        print(f"Interrupted. To go on: python {shlex.join(again)}")
        return INTERRUPTED
    statuses = [run["status"] for run in result["runs"]]
    print(f"{statuses.count('completed')} of {len(statuses)} runs are completed. Files: {folder}")
    return 0 if set(statuses) == {"completed"} else BAD_INPUT if set(statuses) == {"refused"} else 1


def device_count() -> int:
    """Counts the devices. Raises UserError where JAX_PLATFORMS names one that is not here."""
    import jax

    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "there is no such device"
        raise UserError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}") from None


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
    now = datetime.datetime.now(datetime.UTC)
    return f"runs/{experiment}-{cluster.exchange(f'{now:%Y%m%d-%H%M%S-%f}')[0]}"


def refuse(reason: object) -> int:
    """Prints bad input as one line; returns its exit code, or ends all processes of a cluster with it."""
    cluster.fail(f"error: {reason}", BAD_INPUT)
    return BAD_INPUT


def parse(argv: list[str]) -> list[str]:
    """The flags of the command line; bad ones end the program with one line."""
    try:
        return configs.parse_flags(flags.FLAGS, argv)
    except UserError as error:
        sys.exit(refuse(error))


if __name__ == "__main__":
    environment.keep_talking()
    app.run(main, flags_parser=parse)
