"""Train a network, sweep, or only compile and report: the command line.

Below, E stands for experiments/alexnet_cifar.py.

  python launch.py --config E                                   train, on every device there is
  python launch.py --config E --mesh 4x2                        data=4, model=2
  python launch.py --config E --mesh all --sweep parallelism=data,hybrid    a sweep; 8x1,4x2 is one
  python launch.py --config E --mesh 1x1,4x1 --batch_per_device 32,128
                                                                a batch that grows with the mesh
  python launch.py --config E --config.optimizer.learning_rate=0.02        any field: docs/config.md
  python launch.py --config E --cpu_devices 8                   simulate 8 devices on the CPU
  python launch.py --config E --workdir runs/a                  the same workdir again resumes
  python launch.py --workdir runs/a --evaluate                  test the run's newest checkpoint
  python launch.py --config E --dry_run                         compile, print the report, stop
  python launch.py --config E --dry_run --target h100:64x8      the same for 64 hosts of 8 GPUs each
  python launch.py --config E --dry_run --mesh all --sweep parallelism=data,hybrid
                                                                memory and bytes of each, one table
  python launch.py --config E --plan --target h100:8x8          which mesh and scheme, and why

Several hosts: give the same command on each, with JAX_COORDINATOR_ADDRESS=host:port,
JAX_NUM_PROCESSES and JAX_PROCESS_ID set, or under Slurm's srun or Open MPI's mpirun.

Exit codes:
  0   done
  1   a crash, a process of the cluster that is absent or lost, or a sweep with unfinished runs
  2   bad input, or a sweep in which every run is refused
  3   the loss is not finite
  75  interrupted; the command that resumes is printed, if anything was saved
"""

import contextlib
import copy
import datetime
import errno
import gc
import io
import math
import os
import pathlib
import shlex
import signal
import sys
from typing import Any

import ml_collections
from absl import app, flags, logging

from cnn_spmd import config as configs
from cnn_spmd import experiment, worker
from cnn_spmd.data import registry
from cnn_spmd.data.dataset import Found
from cnn_spmd.errors import UnknownName, UserError, one_line
from cnn_spmd.report import write
from cnn_spmd.training import cluster, cluster_env, environment, interrupt, startup, weights
from cnn_spmd.training.provenance import without

CONFIG = experiment.define_flag(flags.FLAGS)
MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Mesh shape DATAxMODEL, such as 4x2; sets config.mesh. Several, joined by commas, are "
    "a sweep; 'all' is 1x1 and every shape of all the devices, 'auto' the one that the plan finds "
    "the fastest (as --config.parallelism=auto for the scheme). With --plan: the meshes to show.",
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
    "After the last step, trace at least this many more (whole chunks, whose results are thrown "
    "away): profile.json gets the top kernels and the communication.",
    lower_bound=1,
)
NOISE_SCALE = flags.DEFINE_integer(
    "noise_scale",
    None,
    "At each evaluation, measure the gradient's noise scale by this many training batches, at most "
    "an epoch; sets config.noise_scale.",
    lower_bound=2,
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
EVALUATE = flags.DEFINE_bool(
    "evaluate",
    False,
    "Test the newest checkpoint of the run in --workdir, with the run's own config, print the "
    "result and append it to evaluations.jsonl there. --workdir may also be a weights file. "
    "Without --workdir: test the weights of --config.init_from.",
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Compile, print placement, memory and collectives, and stop; with "
    "--workdir, also write them there as program.json. A sweep gives one table of all its runs.",
)
PLAN = flags.DEFINE_bool(
    "plan",
    False,
    "Predict a step under each scheme on each mesh over all devices, or on those of --mesh, print "
    "which is the fastest and why, and stop; compiles nothing.",
)
PLAN_ROWS = flags.DEFINE_bool(
    "plan_rows", False, "With --plan: also try rows that split each dense layer in every way."
)
CARD = flags.DEFINE_string(
    "card",
    None,
    "Calibration that predicts the step, such as h200, or a file of python -m cnn_spmd.calibrate; "
    "sets config.card; default: that of the target or the GPUs.",
)
TARGET = flags.DEFINE_string(
    "target",
    None,
    "With --dry_run or --plan: for GPUs that are not here, such as h100:64x8. With --plan and "
    "--card, any name will do.",
)

# Imports and tracing make many objects that stay. With Python's default, 700, the search for
# circular garbage among them takes a fifth of the time before the first step.
gc.set_threshold(100_000, 10, 10)

# Fields whose values are names that an experiment may add; the data set's is checked later.
NAMED = ("model.name", "optimizer.name", "optimizer.decay")

CRASHED, BAD_INPUT, NON_FINITE = 1, 2, 3
INTERRUPTED = 75  # EX_TEMPFAIL in sysexits.h


def main(argv: list[str]) -> int:
    """Run what the flags say, and return the exit code; every known error is one line."""
    for number in interrupt.SIGNALS:  # until the run takes over
        signal.signal(number, interrupt.handle_early_signal)
    try:
        code = launch(argv)
        cluster.leave()
        return code
    except UserError as error:
        return refuse(explained(error))
    except KeyboardInterrupt:
        cluster.fail("Interrupted outside of the training loop: nothing to save.", INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        if line := advice(error):
            cluster.fail(f"error: {line}", CRASHED)
            return CRASHED
        cluster.crash(error)
        raise


def explained(error: UserError) -> UserError:
    """Name the experiment that adds an unknown name, where --config is what a run saved."""
    if not isinstance(error, UnknownName) or error.field in experiment.given_fields(flags.FLAGS):
        return error
    from cnn_spmd.training import restore

    source = experiment.trained_source(flags.FLAGS["config"].config_filename)
    return restore.naming_experiment(error, source) if source else error


def advice(error: Exception) -> str:
    """Say what to do about full memory, a full disk or a bad file; empty for other errors."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        config = CONFIG.value
        return (
            f"batch_size={config.batch_size}, data.resident={config.data.resident}: the memory of "
            "a device or of the host is full: expected a smaller batch_size or model.width, more "
            f"devices, or data.resident=sharded or no ({one_line(error)})"
        )
    if not isinstance(error, OSError):
        return ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"--workdir={WORKDIR.value or 'runs'}: {error.strerror}: make room, and give the same "
            "command with that folder again"
        )
    if error.filename is not None:
        name = os.fsdecode(error.filename)
        return f"{name}: {error.strerror}: mend it, and give the same command again"
    return ""


def launch(argv: list[str]) -> int:
    """Sweep, dry-run or train, as the flags say; return the exit code.

    Raises UserError for bad input.
    """
    refuse_flags(argv)
    if is_sweep():
        set_up_jax()
        return dry_run_sweep() if DRY_RUN.value else launch_sweep()
    configs.validate(CONFIG.value)
    if EVALUATE.value:
        CONFIG.value.data.fallback = ""  # another data set would be no test of this network
    if PLAN.value:
        where = TARGET.value or "the devices of this machine"
        print(f"Planning {CONFIG.value.experiment} on {where}: seconds to a minute.", flush=True)
    # A thread finds the data set, and reads what is read at once, while Python imports jax.
    early = None
    if not (TARGET.value or registry.may_use_tfds(CONFIG.value.data)):
        early = startup.background("data", registry.find, CONFIG.value.data)
    set_up_jax()
    import_training()
    from cnn_spmd.training import unused

    unused.refuse_unknown(CONFIG.value, NAMED)
    unused.refuse(CONFIG.value, experiment.given_fields(flags.FLAGS))
    cluster.join()
    environment.device_count()
    config = config_of_run()
    if cluster_env.variable(os.environ):
        compare_processes(config)
    found = early.result() if early else find_data(config)
    if EVALUATE.value:
        return evaluate(config, found)
    if PLAN.value:
        return print_plan(config, found)
    if is_planned(config):
        take_plan(config, found)
    return report_program(config, found) if DRY_RUN.value else train(config, found)


def find_data(config: ml_collections.ConfigDict) -> Found:
    """Find the config's data set, as a stage.

    With --target: return images of its sizes, if they are known. Raises UserError where they are
    not, and the data set is not here.
    """
    if not TARGET.value:
        with startup.stage("data"):
            return registry.find(config.data)
    from cnn_spmd import plan

    try:
        return plan.stand_in(config.data) or registry.find(config.data)
    except UserError as error:
        raise UserError(
            f"{error}; or take its sizes: --config.data.name=synthetic "
            "--config.data.synthetic.image_size=PIXELS --config.data.synthetic.classes=N"
        ) from error


def refuse_flags(argv: list[str]) -> None:
    """Raise UserError for flags that do not go together, and for other arguments."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: flags start with --, see --help")
    if WORKDIR.value == "":
        raise UserError("--workdir=: is empty, expected a folder")
    if PLAN_ROWS.value and not PLAN.value:
        raise UserError("--plan_rows: expected --plan with it")
    if TARGET.value and not (DRY_RUN.value or PLAN.value):
        raise UserError(
            f"--target={TARGET.value}: those GPUs are not here, expected --dry_run or --plan with "
            "it"
        )
    if TARGET.value and DRY_RUN.value and is_planned(CONFIG.value):
        raise UserError(
            f"--target={TARGET.value}: expected a mesh and a scheme with --dry_run, which --plan "
            "finds first"
        )
    if PLAN.value and BATCH_PER_DEVICE.value:
        raise UserError(
            f"--batch_per_device={BATCH_PER_DEVICE.value}: expected --config.batch_size, the "
            "global batch, with --plan"
        )
    if PLAN.value and (DRY_RUN.value or SWEEP.value or WORKDIR.value):
        raise UserError("--plan: expected no --dry_run, --sweep or --workdir with it")
    if is_sweep() and EVALUATE.value:
        raise UserError("--evaluate: expected a single mesh with it, and no --sweep")
    if is_sweep() and DRY_RUN.value and WORKDIR.value:
        raise UserError(
            f"--workdir={WORKDIR.value}: a dry run of a sweep writes no file, expected no "
            "--workdir with it"
        )
    if EVALUATE.value:
        refuse_with_evaluate()


def refuse_with_evaluate() -> None:
    """Raise UserError for flags that have no effect with --evaluate."""
    for flag in (DRY_RUN, PLAN, PROFILE, NOISE_SCALE):
        if flag.value:
            raise UserError(f"--evaluate: expected no --{flag.name} with it")
    if is_planned(CONFIG.value):
        raise UserError("--evaluate: expected a mesh such as 4x2 with it, not auto")
    if not WORKDIR.value and not CONFIG.value.init_from:
        raise UserError("--evaluate: expected --workdir or --config.init_from with it")


def set_up_jax() -> None:
    """Prepare the process and import jax, on the platform that the flags ask for."""
    if TARGET.value:  # jax reads both variables when it is imported
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs thirty lines for each save
    environment.prepare()
    if TARGET.value:
        environment.simulate(math.prod(planned_gpus()[1:]))
    elif CPU_DEVICES.value:
        environment.simulate(CPU_DEVICES.value)


def planned_gpus() -> tuple[str, int, int]:
    """Return the card, the hosts and the GPUs per host of --target.

    With --plan and a card of the config, the name of --target may be any.
    Raises UserError for an unknown card, and for more GPUs than this machine can simulate.
    """
    from cnn_spmd.analysis import cost, target

    cards, advice = target.CARDS, ""
    if PLAN.value:
        name = TARGET.value.partition(":")[0]
        cards = [name] if name and (CARD.value or CONFIG.value.card) else cost.names()
        advice = (
            "; for another card, give --card the file that python -m cnn_spmd.calibrate writes on "
            "a machine with such GPUs"
        )
    card, hosts, gpus_per_host = target.parse(TARGET.value, cards, advice)
    if hosts * gpus_per_host > configs.MOST_CPU_DEVICES:
        raise UserError(
            f"--target={TARGET.value}: expected at most {configs.MOST_CPU_DEVICES} GPUs with --plan"
        )
    return card, hosts, gpus_per_host


def import_training() -> None:
    """Import what training needs, while a thread starts the devices.

    In a cluster, the processes must first find each other.
    """
    if not cluster_env.variable(os.environ):
        startup.background("devices", environment.device_count)
    with startup.stage("imports", since=0):
        from cnn_spmd.training import loop, unused  # noqa: F401


def take_devices(simulated: int) -> int:
    """Create the devices of a sweep's worker, and count them; 0: none is simulated."""
    if simulated:
        environment.simulate(simulated)
    return environment.device_count()


# ---- A run


def config_of_run() -> ml_collections.ConfigDict:
    """Return the config with what --mesh, --profile, --noise_scale and --card set in it.

    Raises UserError for a card that is none.
    """
    from cnn_spmd.analysis import cost
    from cnn_spmd.sharding import mesh

    config = CONFIG.value
    if MESH.value is not None:
        if any(field.startswith("mesh.") for field in experiment.given_fields(flags.FLAGS)):
            raise UserError(f"--mesh={MESH.value}: config.mesh is given too, expected one of them")
        if MESH.value != configs.AUTO and not PLAN.value:
            config.mesh.update(mesh.parse(MESH.value))
    config.profile = PROFILE.value or config.profile
    config.noise_scale = NOISE_SCALE.value or config.noise_scale
    config.card = CARD.value or config.card
    if config.card:
        cost.load(config.card)
    return config


def compare_processes(config: ml_collections.ConfigDict) -> None:
    """Say the size of the cluster; raise UserError if its processes differ.

    They must have the same flags, code and config.
    """
    from cnn_spmd.training.provenance import provenance
    from cnn_spmd.training.terminal import say

    flags_of_all = (WORKDIR, DRY_RUN, TARGET, EVALUATE)
    given = {f"--{flag.name} given": bool(flag.value) for flag in flags_of_all}
    code = {name: value for name, value in provenance().items() if name != "host_cores"}
    cluster.agree(given | code | dict(config=configs.as_json(config)))
    say(cluster.size())


def report_program(config: ml_collections.ConfigDict, data: Found) -> int:
    """Compile, print the report, and return the exit code."""
    from cnn_spmd.analysis import target
    from cnn_spmd.training import dry_run, workdir

    folder = workdir.parse(WORKDIR.value) if WORKDIR.value else None
    devices = target.devices(TARGET.value) if TARGET.value else None
    report = dry_run.dry_run(config, folder, devices, data)
    if "error" in report:
        print(f"error: there is no whole report: {report['error']}", file=sys.stderr)
        return CRASHED
    return 0


def evaluate(config: ml_collections.ConfigDict, data: Found) -> int:
    """Evaluate what was trained, print the result, and return the exit code."""
    from cnn_spmd.training import evaluate, workdir

    source = workdir.parse(WORKDIR.value) if WORKDIR.value else None
    if source:
        evaluate.refuse_changes(experiment.given_fields(flags.FLAGS))
    evaluate.evaluate_saved(source, config, data)
    return 0


def planned(config: ml_collections.ConfigDict, data: Found, mesh: str) -> Any:
    """Return the plan for --target, or for the devices that are here."""
    import jax

    from cnn_spmd import plan
    from cnn_spmd.analysis import cost
    from cnn_spmd.training import prediction

    if TARGET.value:
        name, _, gpus_per_host = planned_gpus()
        card = cost.load(config.card or name)
        if config.dtype == "auto":
            config.dtype = "bfloat16"  # as on a GPU; the devices that stand for them are a CPU's
    else:
        gpus_per_host = jax.local_device_count()
        card = prediction.card_of(config, jax.devices()[0].device_kind)
    return plan.plan(config, data, card, gpus_per_host, mesh)


def print_plan(config: ml_collections.ConfigDict, data: Found) -> int:
    """Print what a step costs under each scheme on each mesh, and return the exit code."""
    from cnn_spmd import plan

    if PLAN_ROWS.value:
        with config.unlocked():
            config.placement.update(plan.rows_of_dense_layers())
    if "parallelism" not in experiment.given_fields(flags.FLAGS):
        config.parallelism = configs.AUTO
    print(*plan.as_text(planned(config, data, planned_meshes())), sep="\n")
    return 0


def planned_meshes() -> str:
    """Return the meshes of --mesh that a plan shows, joined by commas; "auto" for all.

    Raises UserError for a mesh that does not take all devices.
    """
    import jax

    from cnn_spmd.sharding import mesh

    if MESH.value in (None, configs.AUTO, "all"):
        return configs.AUTO
    shapes, devices = MESH.value.lower().split(","), len(jax.devices())
    for shape in shapes:
        if math.prod(mesh.parse(shape).values()) != devices:
            raise UserError(
                f"--mesh={MESH.value}: {shape} does not take all {devices} devices, expected "
                f"shapes of {', '.join(mesh.shapes_over(devices))} with --plan"
            )
    return ",".join(dict.fromkeys(shapes))


def is_planned(config: ml_collections.ConfigDict) -> bool:
    """Return whether the planner is to choose the mesh or the scheme."""
    return configs.AUTO in (MESH.value, config.parallelism)


def take_plan(config: ml_collections.ConfigDict, data: Found) -> None:
    """Set a mesh and a scheme that are "auto" to what the planner finds the fastest."""
    from cnn_spmd import plan
    from cnn_spmd.sharding import mesh
    from cnn_spmd.training.terminal import say

    sizes = mesh.shape(config.mesh, environment.device_count()).values()
    shape = "x".join(str(size) for size in sizes)
    with contextlib.redirect_stdout(io.StringIO()):  # the run itself will print it
        found = planned(config, data, MESH.value if MESH.value == configs.AUTO else shape)
    best = found.predictions[0]
    config.mesh.update(mesh.parse(best.mesh))
    config.parallelism = best.parallelism
    say(plan.why(found))


def train(config: ml_collections.ConfigDict, data: Found) -> int:
    """Train or resume the run, print how it ended, and return the exit code."""
    from cnn_spmd.training import checkpoint, loop, workdir

    folder = workdir.parse(WORKDIR.value or default_workdir(config.experiment))
    try:
        summary = loop.train(config, folder, data)
    except checkpoint.SaveError as error:
        cluster.fail(f"error: {error}", CRASHED)
        return CRASHED
    except loop.NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return NON_FINITE
    if summary["status"] == "interrupted":
        print(f"Interrupted and saved at step {summary['steps']}. To resume: {again(folder)}")
        return INTERRUPTED
    print(
        f"Done: {configs.shown_data(config, summary['dataset'])} "
        f"{configs.evaluated_split(config)} accuracy "
        f"{summary['eval']['accuracy']:.2%} after {summary['steps']} steps, "
        f"{summary['train_seconds']:.1f} s of training. Files: {folder}"
    )
    return 0


def again(folder: pathlib.Path) -> str:
    """Return the command that goes on in a folder."""
    arguments = sys.argv if WORKDIR.value else [*sys.argv, "--workdir", str(folder)]
    return f"python {shlex.join(arguments)}"


def default_workdir(name: str) -> str:
    """Return runs/<name>-<UTC time>, the same on every process of a cluster.

    The time has microseconds, since runs that a script starts at once may share a millisecond.
    """
    now = datetime.datetime.now(datetime.UTC)
    return f"runs/{name}-{cluster.exchange(f'{now:%Y%m%d-%H%M%S-%f}')[0]}"


# ---- A sweep


def is_sweep() -> bool:
    """Return whether the flags name several runs."""
    meshes = MESH.value or ""
    several_meshes = ("," in meshes or meshes == "all") and not PLAN.value
    return bool(SWEEP.value) or BATCH_PER_DEVICE.value is not None or several_meshes


def launch_sweep() -> int:
    """Run every combination that the flags name; return the exit code.

    This process only plans: it simulates the devices, so that the worker can have the real ones.
    """
    if name := cluster_env.variable(os.environ):  # no other process waits for this one
        print(
            f"error: {name}={os.environ[name]}: a sweep runs in one process, expected a single "
            "run, or srun's or mpirun's variables unset",
            file=sys.stderr,
        )
        return BAD_INPUT
    with worker.Worker(CPU_DEVICES.value) as runner:
        runner.start()  # it imports jax while this process imports what the plan needs
        from cnn_spmd.training import workdir

        folder = workdir.parse(WORKDIR.value or default_workdir(f"{CONFIG.value.experiment}-sweep"))
        try:
            result = sweep_in(folder, runner)
            if not (folder / "sweep.json").exists():  # every combination is refused
                return BAD_INPUT
            for path in write.write_report([folder]):
                print(path)
        except KeyboardInterrupt:
            print(f"Interrupted. To go on: {again(folder)}")
            return INTERRUPTED
    statuses = [run["status"] for run in result["runs"]]
    print(f"{statuses.count('completed')} of {len(statuses)} runs are completed. Files: {folder}")
    if set(statuses) == {"completed"}:
        return 0
    return BAD_INPUT if set(statuses) == {"refused"} else CRASHED


def sweep_in(folder: pathlib.Path, runner: worker.Worker) -> dict:
    """Run what the flags name in `folder`; return sweep.json."""
    import jax

    from cnn_spmd import sweep_run

    environment.simulate(runner.cpu_devices or runner.device_count())
    devices = jax.devices()
    combos, shared = swept(len(devices))
    if len({combo.get("model.name") for combo in combos}) > 1:
        print(
            f"warning: all networks are trained by one recipe, that of {CONFIG.value.experiment}; "
            "for a recipe of its own, run a network with another --config"
        )
    return sweep_run.run(CONFIG.value.experiment, shared, combos, devices, runner, folder)


def swept(device_count: int) -> tuple[list[dict[str, str]], list[str]]:
    """Return the combinations that the flags name, and launch.py's arguments that all share.

    Raises UserError for a field or scheme that is unknown, or that no combination uses.
    """
    from cnn_spmd import sweep
    from cnn_spmd.training import unused

    combos = sweep.combinations(MESH.value, BATCH_PER_DEVICE.value, SWEEP.value, device_count)
    arguments = flags.FLAGS.read_flags_from_files(sys.argv[1:])
    shared = without(arguments, {"mesh", "sweep", "batch_per_device", "workdir", "card"})
    shared += [f"--config.card={CARD.value}"] * bool(CARD.value)
    unused.refuse_unknown(CONFIG.value, [name for name in NAMED if name not in combos[0]])
    sweep.refuse_fields(combos, shared, device_count)
    return combos, shared


def dry_run_sweep() -> int:
    """Compile every combination that the flags name, print one table; return the exit code."""
    import jax

    from cnn_spmd import sweep, sweep_screen
    from cnn_spmd.analysis import target

    devices = target.devices(TARGET.value) if TARGET.value else jax.devices()
    combos, shared = swept(len(devices))
    rows = sweep_screen.show_dry_run(sweep.dry_run(combos, shared, devices, find_data), len(combos))
    if not any(row["reason"] for row in rows):
        return 0
    return BAD_INPUT if all(row["status"] == "refused" for row in rows) else CRASHED


# ---- The program


def refuse(reason: object) -> int:
    """Print bad input as one line and return its exit code.

    All processes of a cluster end.
    """
    cluster.fail(f"error: {reason}", BAD_INPUT)
    return BAD_INPUT


def parse(argv: list[str]) -> list[str]:
    """Return the arguments that are no flags; bad flags end the program with one line."""
    try:
        take_saved_config(argv)
        return experiment.parse_flags(flags.FLAGS, argv)
    except UserError as error:
        sys.exit(refuse(error))


def take_saved_config(argv: list[str]) -> None:
    """Let --evaluate read the config of what --workdir holds.

    argv: sys.argv, which changes. An experiment that --config names is run all the same, as the run
    may need what it adds; a line says that its config does not count.
    """
    early = flags.FlagValues()  # --config.FIELD can be parsed only once there is a --config
    early.set_gnu_getopt()
    flags.DEFINE_string("config", None, "the experiment", flag_values=early)
    for name in ("evaluate", "workdir"):
        early[name] = copy.deepcopy(flags.FLAGS[name])
    with contextlib.suppress(flags.Error):  # parse_flags says what is wrong
        early(argv, known_only=True)
    if not (early.is_parsed() and early.evaluate and early.workdir):
        return
    source = configs.expanded("--workdir", early.workdir)
    weights.read_saved(source)  # for its errors
    saved = source if weights.is_file(source) else source / "config.json"
    if early.config is not None:
        experiment.load_file(early.config)
        print(f"--evaluate takes the config of {saved}, not that of {early.config}.")
    argv[1:] = [f"--config={saved}", *without(argv[1:], {"config"})]


def run_command() -> None:
    """Do what sys.argv says, and end the process with the exit code."""
    environment.protect_streams()
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    if sys.argv[1:2] == [worker.ARGUMENT]:
        worker.serve(run_command, take_devices)
    else:
        try:
            run_command()
        except SystemExit as ended:
            startup.end_process(ended.code)
            raise
