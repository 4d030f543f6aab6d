"""A run, top to bottom: mesh, data, state, compile report, loop, final evaluation."""

import datetime
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from cnn_spmd import config as configs
from cnn_spmd import mesh as meshes
from cnn_spmd import metrics as metrics_lib
from cnn_spmd import models, optim, program
from cnn_spmd.checkpoint import Checkpoints
from cnn_spmd.data import batches, sources
from cnn_spmd.errors import UserError
from cnn_spmd.interrupt import Interrupt
from cnn_spmd.placement import Placement
from cnn_spmd.step import DeviceData, Steps


class NonFinite(RuntimeError):
    """The loss or the parameters are no longer finite: the run stops and keeps its last good checkpoint."""


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path | None, dry_run: bool = False) -> dict:
    """Trains, or resumes, the run of `config` in `workdir`; returns its summary (DESIGN.md, files of a run).

    dry_run: compile, print placement, memory and collectives, and stop (workdir None: nothing is written).
    Raises UserError for bad input before anything is compiled, NonFinite where training diverges.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda *_: None

    # ---- What is trained, on what: every refusal comes from this section or the next.
    configs.validate(config)
    place = Placement(meshes.make(config.mesh.data, config.mesh.model), config.parallelism)
    data = sources.load(config.data)
    if jax.process_count() > 1:  # each process decides on the fallback by itself: they must have come to the same
        name = np.frombuffer(data.name.encode().ljust(16), np.uint8)
        multihost_utils.assert_equal(name, f"data: this process has {data.name}, another one has another data set")
    config = configs.resolve(config, data)
    config.mesh.data, config.mesh.model = place.mesh.shape.values()
    total, batch_size, examples = config.steps, config.batch_size, len(data.train_images)
    per_epoch = examples // batch_size
    place.spec(("conv_batch",), (batch_size,), "batch_size")
    indices_sharding = place.sharding((None, "conv_batch"), (1, batch_size))
    steps = make_steps(config, data, place)
    abstract = steps.abstract_state
    param_count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    fallback = data.fallback or None
    identity = dict(dataset=data.name, fallback=fallback)
    old_summary = open_workdir(workdir, config.to_dict() | identity, total) if workdir else {}
    if old_summary.get("status") == "completed" and old_summary["steps"] == total and not dry_run:
        say(f"{workdir} is complete: {total} steps, test accuracy {old_summary['eval']['accuracy']:.2%}. Nothing to do.")
        return old_summary

    # ---- State: restored where there is a checkpoint (on whatever mesh it was saved), else new; created sharded.
    checkpoints = state = None
    start = 0
    if not dry_run:
        checkpoints = Checkpoints(workdir.resolve() / "checkpoints", config.checkpoint.keep)
        state = checkpoints.restore(abstract)
        if state is not None:
            start = int(state.step)
            say(f"Resumed {workdir} at step {start} on mesh {place.shape}.")
        if start > total:
            raise UserError(f"steps={total}: {workdir} is at step {start} already; the number of steps may grow, not shrink")

    # ---- Compile, and say what the program is.
    eval_every, save_every = config.eval.every_epochs * per_epoch, config.checkpoint.every_epochs * per_epoch
    stops = sorted({total}.union(*(range(every, total, every) for every in (eval_every, save_every) if every)))
    calls = plan(start, stops, config.steps_per_call)
    clock_compile = time.perf_counter()
    train_data = DeviceData(put(data.train_images, place.replicated), put(data.train_labels, place.replicated))
    test_data = DeviceData(put(data.test_images, place.replicated), put(data.test_labels, place.replicated))
    eval_batches = [tuple(put(x, place.sharding(("conv_batch",), x.shape)) for x in pair)
                    for pair in zip(*batches.eval_indices(batch_size, len(data.test_images)), strict=True)]
    jitted = steps.jit_train()
    programs = {}
    for n in {config.steps_per_call, *calls}:
        indices = jax.ShapeDtypeStruct((n, batch_size), jnp.int32, sharding=indices_sharding)
        programs[n] = jitted.lower(abstract, train_data, indices).compile()
    eval_program = steps.jit_eval().lower(abstract.params, test_data, *eval_batches[0]).compile()
    compile_seconds = time.perf_counter() - clock_compile

    report = identity | dict(
        parallelism=config.parallelism, mesh=dict(place.mesh.shape), devices=place.mesh.size,
        device_kind=place.mesh.devices.flat[0].device_kind, batch_size=batch_size, param_count=param_count,
        placement=place.report(abstract.params),
        bytes_per_device=dict(parameters=program.bytes_per_device(abstract.params),
                              optimizer=program.bytes_per_device(abstract.optimizer)),
        compile_seconds=round(compile_seconds, 2)) | program.report(programs[config.steps_per_call], place.mesh)
    say(program.as_text(report))
    if workdir and jax.process_index() == 0:
        metrics_lib.write_json(workdir / "program.json", report)
    if dry_run:
        return report

    # ---- The loop: calls of some steps each; evaluation and checkpoints fall between two calls.
    state = state if state is not None else steps.jit_init()()
    metrics = metrics_lib.Metrics(workdir, start, identity, enabled=jax.process_index() == 0)
    progress = metrics_lib.Progress(total, show=jax.process_index() == 0)
    clock = metrics_lib.Clock()
    schedule = optim.make_schedule(config.optimizer, total)
    step, eval_seconds, evaluation, status = start, 0.0, None, "failed"

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
        metrics.write(step, split, **result)
        progress.say(f"step {step}/{total}  {split}: test accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f} "
                     f"over {result['examples']} images")
        return result

    def save(accuracy: float | None) -> None:
        if not all_finite(state.params):
            raise NonFinite(f"parameters are not finite after step {step}")
        checkpoints.save(step, state, accuracy)

    try:
        with Interrupt() as interrupt:
            clock.start()
            for n in calls:
                indices = batches.train_indices(config.seed, step, n, batch_size, examples)
                state, values = programs[n](state, train_data, put(indices, indices_sharding))
                step += n
                record(np.asarray(values["loss"]), np.asarray(values["accuracy"]))
                interrupted = interrupt.requested()
                if step == total or (step not in stops and not interrupted):
                    continue
                evaluation = evaluate("eval") if eval_every and step % eval_every == 0 and not interrupted else None
                if interrupted or (save_every and step % save_every == 0):
                    save(evaluation["accuracy"] if evaluation else None)
                if interrupted:
                    status = "interrupted"
                    break
                clock.start()
            else:
                evaluation = evaluate("final")
                if step > start:
                    save(evaluation["accuracy"])
                status = "completed"
            checkpoints.close()
    except NonFinite as error:
        status = "non-finite"
        checkpoints.close()
        raise NonFinite(f"{error}. Stopped; {checkpoints.last_good()}") from None
    finally:
        progress.close()
        metrics.close()
        summary = dict(
            experiment=config.experiment, **identity, model=config.model.name, parallelism=config.parallelism,
            mesh=dict(place.mesh.shape), devices=place.mesh.size, device_kind=report["device_kind"],
            processes=jax.process_count(), batch_size=batch_size, steps=step, epochs=round(step / per_epoch, 3),
            seed=config.seed, dtype=config.dtype, param_count=param_count, compile_seconds=report["compile_seconds"],
            train_seconds=round(metrics.train_seconds + clock.seconds, 3),
            images_per_second=round(clock.steps_per_second() * batch_size, 1) if clock.calls else None,
            step_milliseconds=clock.step_milliseconds(), eval=evaluation, bytes_per_device=report["bytes_per_device"],
            collectives=report["collectives"], **metrics_lib.provenance(), started=started, status=status,
            config=config.to_dict())
        if jax.process_index() == 0:
            metrics_lib.write_json(workdir / "summary.json", summary)
    return summary


def make_steps(config: ml_collections.ConfigDict, data: sources.Dataset, place: Placement) -> Steps:
    """The step functions of a resolved config. Raises UserError for an unknown model, image size or decay."""
    mean_C, std_C = batches.channel_statistics(data.train_images)
    if config.data.flip and not data.mirror:
        print(f"data.flip=True has no effect: a mirrored image of {data.name} is another class, or none.", flush=True)
    make_model = functools.partial(
        models.make, config.model.name, image_size=data.train_images.shape[1], classes=len(data.class_names),
        dropout=config.model.dropout, dtype=jnp.dtype(config.dtype))
    return Steps(make_model=lambda rngs: make_model(rngs=rngs), place=place, mean_C=mean_C, std_C=std_C,
                 optimizer=optim.make_optimizer(config.optimizer, config.steps), seed=config.seed,
                 label_smoothing=config.label_smoothing, crop_pad=config.data.crop_pad,
                 flip=config.data.flip and data.mirror, flip_average=config.eval.flip_average and data.mirror)


def open_workdir(workdir: pathlib.Path, config: dict, total: int) -> dict:
    """Makes the workdir, or checks that it holds a run of this config; returns its summary ({} where there is none).

    Raises UserError for a folder that cannot be written, that is not a run's, or whose run had another config.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".writable").touch()
        (workdir / ".writable").unlink()
        content = list(workdir.iterdir())
        path = workdir / "config.json"
        if content and not path.exists():
            raise UserError(f"--workdir={workdir}: is not empty and holds no run (no config.json): give a new folder")
        if content:
            configs.refuse_changes(json.loads(path.read_text()), config)
        summary = workdir / "summary.json"
        old = json.loads(summary.read_text()) if summary.exists() else {}
        if jax.process_index() == 0:
            metrics_lib.write_json(path, config)
        return old
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}): give another folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"--workdir={workdir}: config.json or summary.json is damaged ({error}): give a new folder") from None


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
