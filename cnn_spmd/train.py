"""A run, top to bottom: mesh, data, state, compile report, loop, final evaluation."""

import datetime
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from cnn_spmd import communication, models, optim, program
from cnn_spmd import config as configs
from cnn_spmd import mesh as meshes
from cnn_spmd import metrics as metrics_lib
from cnn_spmd import workdir as workdirs
from cnn_spmd.checkpoint import Checkpoints
from cnn_spmd.data import batches, sources
from cnn_spmd.errors import UserError
from cnn_spmd.interrupt import Interrupt
from cnn_spmd.placement import Placement, name_of
from cnn_spmd.step import DeviceData, Steps


class NonFinite(RuntimeError):
    """The loss or the parameters are no longer finite: the run stops and keeps its last good checkpoint."""


class Setup(NamedTuple):
    """What is trained, on what, where: a resolved config and what it stands for."""

    config: ml_collections.ConfigDict
    data: sources.Dataset
    place: Placement
    steps: Steps


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """Trains, or resumes, the run of `config` in `workdir`; returns its summary (README.md, a run's files).

    Raises UserError for bad input before anything is compiled, NonFinite where training diverges.
    """
    with Interrupt() as interrupt:
        setup = prepare(config)
        interrupt.check()
        return run_in(setup, workdir, interrupt)


def run_in(setup: Setup, workdir: pathlib.Path, interrupt: Interrupt) -> dict:
    """The run in its workdir, unless it is complete already; returns its summary."""
    identity = dict(dataset=setup.data.name, fallback=setup.data.fallback)
    with workdirs.opened(workdir, setup.config.to_dict() | identity) as old_summary:
        if old_summary.get("status") == "completed" and old_summary.get("steps") == setup.config.steps:
            say(f"{workdir} is complete: {setup.config.steps} steps, test accuracy "
                f"{old_summary['eval']['accuracy']:.2%}. Nothing to do.")
            return old_summary
        return train(setup, workdir, identity, interrupt)


def train(setup: Setup, workdir: pathlib.Path, identity: dict, interrupt: Interrupt) -> dict:
    """The run itself, in a workdir that is ours; `identity` (data set, fallback) goes into each of its files."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    config, data, place, steps = setup
    is_main = jax.process_index() == 0
    total, batch_size, examples = config.steps, config.batch_size, len(data.train_images)
    per_epoch = examples // batch_size

    # ---- State: restored where there is a checkpoint (on whatever mesh it was saved), else new; created sharded.
    checkpoints = Checkpoints(workdir.resolve() / "checkpoints", config.checkpoint.keep)
    state = checkpoints.restore(steps.abstract_state)
    start = 0 if state is None else int(state.step)
    if start > total:
        raise UserError(f"steps={total}: {workdir} is at step {start} already; the number of steps may grow, not shrink")
    if start:
        say(f"Resumed {workdir} at step {start} on mesh {place.shape}.")
    elif (workdir / "metrics.jsonl").exists():
        say(f"{workdir} has no checkpoint to go on from: starting again at step 0; the old metrics are kept as "
            "metrics.jsonl.old.")

    # ---- Compile, and say what the program is.
    eval_every, save_every = config.eval.every_epochs * per_epoch, config.checkpoint.every_epochs * per_epoch
    stops = sorted({total}.union(*(range(every, total, every) for every in (eval_every, save_every) if every)))
    calls = plan(start, stops, config.steps_per_call)
    since = time.perf_counter()
    programs = {n: compile_train(setup, n) for n in {config.steps_per_call, *calls}}
    test_data = DeviceData(put(data.test_images, place.replicated), put(data.test_labels, place.replicated))
    eval_batches = [tuple(put(x, place.sharding(("conv_batch",), x.shape)) for x in pair)
                    for pair in zip(*batches.eval_indices(batch_size, len(data.test_images)), strict=True)]
    eval_program = steps.jit_eval().lower(steps.abstract_state.params, test_data, *eval_batches[0]).compile()
    report = report_of(setup, programs[config.steps_per_call], time.perf_counter() - since)
    say(program.as_text(report))
    interrupt.check()

    # ---- The loop: calls of some steps each; evaluation and checkpoints fall between two calls.
    train_data = DeviceData(put(data.train_images, place.replicated), put(data.train_labels, place.replicated))
    state = state if state is not None else steps.jit_init()()
    schedule = optim.make_schedule(config.optimizer, total)
    float(schedule(start))  # compiled here, not within the first call
    metrics = metrics_lib.Metrics(workdir, start, identity, enabled=is_main)
    progress = metrics_lib.Progress(total, show=is_main)
    clock = metrics_lib.Clock()
    step, eval_seconds, evaluation = start, 0.0, None

    def record(losses: np.ndarray, accuracies: np.ndarray) -> None:
        n = len(losses)
        seconds = clock.tick(n)
        if not np.isfinite(losses).all():
            at = int(np.argmin(np.isfinite(losses)))
            bad = step - n + at + 1
            raise NonFinite(f"loss is {losses[at]} at step {bad} (learning rate {schedule(bad - 1):.4g})")
        row = dict(loss=float(losses.mean()), accuracy=float(accuracies.mean()), images_per_second=n * batch_size / seconds)
        metrics.write(step, "train", **row, learning_rate=float(schedule(step - 1)), steps=n,
                      train_seconds=metrics.train_seconds + clock.seconds)
        evals_left = 1 + (total // eval_every - step // eval_every if eval_every else 0)
        progress.update(step, **row, eta=(total - step) / clock.steps_per_second() + eval_seconds * evals_left)

    def evaluate(split: str) -> dict:
        nonlocal eval_seconds
        since = time.perf_counter()
        parts = [eval_program(state.params, test_data, *batch) for batch in eval_batches]
        result = evaluation_of(parts, len(data.test_images))
        eval_seconds = time.perf_counter() - since
        if not np.isfinite(result["loss"]):
            raise NonFinite(f"test loss is {result['loss']} after step {step}")
        metrics.write(step, split, **result)
        progress.say(f"step {step}/{total}  {split}: test accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f} "
                     f"over {result['examples']} images")
        return result

    def save(accuracy: float | None) -> None:
        if not all_finite(state.params):
            raise NonFinite(f"parameters are not finite after step {step}")
        checkpoints.save(step, state, accuracy)

    def summarise(status: str) -> dict:
        summary = dict(
            experiment=config.experiment, **identity, model=config.model.name, parallelism=config.parallelism,
            mesh=dict(place.mesh.shape), devices=place.mesh.size, device_kind=report["compiler"]["device_kind"],
            processes=jax.process_count(), batch_size=batch_size, steps=step, epochs=round(step / per_epoch, 3),
            seed=config.seed, dtype=config.dtype, param_count=report["param_count"], compile_seconds=report["compile_seconds"],
            train_seconds=round(metrics.train_seconds + clock.seconds, 3),
            images_per_second=round(clock.steps_per_second() * batch_size, 1) if clock.calls else None,
            step_milliseconds=clock.step_milliseconds(), eval=evaluation, bytes_per_device=report["bytes_per_device"],
            collectives=report["collectives"], **metrics_lib.provenance(), started=started, status=status,
            config=config.to_dict())
        if is_main:
            metrics_lib.write_json(workdir / "summary.json", summary)
        return summary

    if is_main:
        metrics_lib.write_json(workdir / "config.json", config.to_dict() | identity)
        metrics_lib.write_json(workdir / "program.json", identity | report)
    status = "failed"
    try:
        summarise("running")
        clock.start()
        for n in calls:
            indices = batches.train_indices(config.seed, step, n, batch_size, examples)
            state, values = programs[n](state, train_data, put(indices, indices_sharding(setup, n)))
            step += n
            record(np.asarray(values["loss"]), np.asarray(values["accuracy"]))
            interrupted = interrupt.requested()
            if step == total or (step not in stops and not interrupted):
                continue
            evaluation = evaluate("eval") if eval_every and step % eval_every == 0 and not interrupted else None
            if interrupted or (save_every and step % save_every == 0):
                save(evaluation["accuracy"] if evaluation else None)
            if interrupted:
                checkpoints.close()
                status = "interrupted"
                break
            clock.start()
        else:
            evaluation = evaluate("final")
            if step > start:
                save(evaluation["accuracy"])
            checkpoints.close()
            status = "completed"
    except NonFinite as error:
        checkpoints.close()
        status = "non-finite"
        raise NonFinite(f"{error}. Stopped; {checkpoints.last_good()}") from None
    finally:
        progress.close()
        metrics.close()
        summary = summarise(status)
    return summary


def dry_run(config: ml_collections.ConfigDict, workdir: pathlib.Path | None, devices: list | None = None) -> dict:
    """Compiles the train step, prints the report and returns it; with a workdir, also writes it there as program.json.

    devices: those of a machine that is not here (target.py); None: the ones there are.
    """
    setup = prepare(config, devices)
    since = time.perf_counter()
    report = report_of(setup, compile_train(setup, setup.config.steps_per_call), time.perf_counter() - since)
    say(program.as_text(report))
    if workdir:
        identity = dict(dataset=setup.data.name, fallback=setup.data.fallback)
        with workdirs.opened(workdir, setup.config.to_dict() | identity):
            if (workdir / "config.json").exists():
                raise UserError(f"--workdir={workdir}: holds a run, which a dry run leaves alone: give a new folder")
            metrics_lib.write_json(workdir / "program.json", identity | report)
    return report


def prepare(config: ml_collections.ConfigDict, devices: list | None = None) -> Setup:
    """Mesh, data, model and step functions of a config. Every UserError but the workdir's is raised here."""
    configs.validate(config)
    place = Placement(meshes.make(config.mesh.data, config.mesh.model, devices), config.parallelism,
                      config.placement.to_dict())
    data = sources.load(config.data)
    if jax.process_count() > 1:  # each process decides on the fallback by itself: they must have come to the same
        name = np.frombuffer(data.name.encode().ljust(16), np.uint8)
        multihost_utils.assert_equal(name, f"data: this process has {data.name}, another one has another data set")
    config = configs.resolve(config, data, place.mesh.devices.flat[0].platform)
    config.mesh.data, config.mesh.model = place.mesh.shape.values()
    if data.fallback:
        say(f"For {data.name}: batch_size={config.batch_size}, optimizer.learning_rate={config.optimizer.learning_rate}, "
            f"steps={config.steps}, from data.fallback_*.")
    place.spec(("conv_batch",), (config.batch_size,), "batch_size")
    setup = Setup(config, data, place, make_steps(config, data, place))
    setup.steps.activations(config.batch_size, data.train_images.shape[1])
    setup.steps.abstract_state  # noqa: B018  (placed here for its errors)
    return setup


def make_steps(config: ml_collections.ConfigDict, data: sources.Dataset, place: Placement) -> Steps:
    """The step functions of a resolved config. Raises UserError for what does not go together."""
    if place.row.get("group_in") and getattr(models.MODELS.get(config.model.name), "towers", None) == 1:
        raise UserError(f"parallelism={place.parallelism}: splits towers, but model.name={config.model.name} has one: "
                        "expected alexnet_2012 or another parallelism")
    if config.data.flip and not data.mirror:
        say(f"data.flip=True has no effect: a mirrored image of {data.name} is another class, or none.")
    dense_optimizer = None
    if config.dense_microbatch:
        parts, rest = divmod(config.batch_size, config.dense_microbatch)
        if rest:
            raise UserError(f"dense_microbatch={config.dense_microbatch}: does not divide batch_size={config.batch_size}")
        place.spec(("conv_batch",), (config.dense_microbatch,), "dense_microbatch")
        if config.dense_updates == "each":
            dense_optimizer = optim.make_optimizer(config.optimizer, config.steps, parts)
    make_model = functools.partial(
        models.make, config.model.name, image_size=data.train_images.shape[1], classes=len(data.class_names),
        width=config.model.width, dropout=config.model.dropout, dtype=jnp.dtype(config.dtype))
    mean_C, std_C = batches.channel_statistics(data.train_images)
    return Steps(make_model=lambda rngs: make_model(rngs=rngs), place=place, mean_C=mean_C, std_C=std_C,
                 optimizer=optim.make_optimizer(config.optimizer, config.steps), dense_optimizer=dense_optimizer,
                 dense_microbatch=config.dense_microbatch, seed=config.seed,
                 label_smoothing=config.label_smoothing, crop_pad=config.data.crop_pad,
                 flip=config.data.flip and data.mirror, flip_average=config.eval.flip_average and data.mirror)


def indices_sharding(setup: Setup, n: int) -> jax.sharding.NamedSharding:
    """Where the indices [n steps, batch] of a call live."""
    return setup.place.sharding((None, "conv_batch"), (n, setup.config.batch_size))


def compile_train(setup: Setup, n: int) -> jax.stages.Compiled:
    """The program of n train steps, from shapes alone."""
    def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=setup.place.replicated)

    data = DeviceData(abstract(setup.data.train_images), abstract(setup.data.train_labels))
    indices = jax.ShapeDtypeStruct((n, setup.config.batch_size), jnp.int32, sharding=indices_sharding(setup, n))
    return setup.steps.jit_train().lower(setup.steps.abstract_state, data, indices).compile()


def report_of(setup: Setup, compiled: jax.stages.Compiled, compile_seconds: float) -> dict:
    """What a compiled program holds and moves, JSON-ready: placement, memory, collectives, and theory beside them."""
    config, data, place, steps = setup
    abstract = steps.abstract_state
    leaves = jax.tree_util.tree_leaves_with_path(abstract.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    params = [(name_of(path), leaf) for path, leaf in leaves]
    activations = steps.activations(config.batch_size, data.train_images.shape[1])
    itemsize = jnp.dtype(config.dtype).itemsize
    report = program.report(compiled, place.mesh)
    theory = [] if config.dense_microbatch else communication.closed_form(place, activations, params, itemsize)
    return dict(
        parallelism=config.parallelism, devices=place.mesh.size, model=config.model.name, batch_size=config.batch_size,
        dtype=config.dtype, dataset=data.name, fallback=data.fallback, param_count=sum(leaf.size for _, leaf in params),
        placement=[place.report(name, leaf.axes, leaf.shape, leaf.dtype.itemsize) for name, leaf in params],
        activations=[place.report(*activation, itemsize) for activation in activations],
        bytes_per_device=dict(parameters=program.bytes_per_device(abstract.params),
                              optimizer=program.bytes_per_device(abstract.optimizer)),
        closed_form=theory, communication=communication.compare(report["collectives"], theory) if theory else [],
        closed_form_ring_bytes=sum(row["ring_bytes"] for row in theory),
        compile_seconds=round(compile_seconds, 2)) | report


def say(text: str) -> None:
    """Prints a line on one process of a cluster."""
    if jax.process_index() == 0:
        print(text, flush=True)


def plan(start: int, stops: list[int], steps_per_call: int) -> list[int]:
    """How many steps each call from step `start` on does, so that every stop (ascending) is the end of a call."""
    calls = []
    for stop in stops:
        while start < stop:
            calls.append(min(steps_per_call, stop - start))
            start += calls[-1]
    return calls


def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """The host's array on the devices of any process; every process gives the same array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def evaluation_of(parts: list[dict], examples: int) -> dict[str, Any]:
    """accuracy and top5 (0 to 1), mean loss (nats) and examples, from eval_step's sums; all examples must be in them."""
    sums = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
    if sums["examples"] != examples:
        raise AssertionError(f"evaluated {sums['examples']} examples of {examples}")
    return dict(accuracy=sums["correct"] / examples, top5=sums["top5"] / examples, loss=sums["loss"] / examples,
                examples=examples)


@jax.jit
def all_finite(params: nnx.State) -> jax.Array:
    """True where no parameter is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
