"""A run, top to bottom: mesh, data, state, compile report, loop, final evaluation."""

import concurrent.futures
import contextlib
import datetime
import functools
import itertools
import pathlib
import secrets
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from cnn_spmd import config as configs
from cnn_spmd.analysis import profile, program
from cnn_spmd.data import order
from cnn_spmd.data.feed import put
from cnn_spmd.errors import UserError
from cnn_spmd.training import cluster, optim, runfiles
from cnn_spmd.training import log as metrics_lib
from cnn_spmd.training import workdir as workdirs
from cnn_spmd.training.build import (
    Setup,
    compile_train,
    feeds,
    prepare,
    refuse_beyond_memory,
    report_of,
)
from cnn_spmd.training.checkpoint import Checkpoints, SaveError
from cnn_spmd.training.clock import Clock, process_seconds
from cnn_spmd.training.interrupt import Interrupt
from cnn_spmd.training.log import say

# One entry a program that came from JAX's persistent cache instead of being compiled.
CACHE_HITS: list[str] = []
jax.monitoring.register_event_listener(
    lambda event, **_: (
        CACHE_HITS.append(event) if event == "/jax/compilation_cache/cache_hits" else None
    )
)


class NonFinite(RuntimeError):
    """The loss or the parameters are no longer finite: the run stops and keeps its last good checkpoint."""


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """Trains, or resumes, the run of `config` in `workdir`; returns its summary (README.md, a run's files).

    Raises UserError for bad input before anything is compiled, NonFinite where training diverges.
    """

    def folder_is_fine(setup: Setup) -> None:
        refuse_beyond_memory(setup)
        with workdirs.opened(workdir, setup.saved_config):
            pass

    setup = prepare(
        config, check=folder_is_fine
    )  # a signal that comes meanwhile raises KeyboardInterrupt: launch.py
    with Interrupt() as interrupt:
        interrupt.check()
        with workdirs.opened(workdir, setup.saved_config) as old_summary:
            cluster.same_folder(workdir, workdir / workdirs.LOCK)
            evaluation = old_summary.get("eval")
            accuracy = evaluation.get("accuracy") if isinstance(evaluation, dict) else None
            done = (
                old_summary.get("status") == "completed"
                and old_summary.get("steps") == setup.config.steps
            )
            if done and isinstance(accuracy, float):
                say(
                    f"{workdir} is complete: {setup.config.steps} steps, test accuracy {accuracy:.2%}. Nothing to do"
                    + (
                        ", and nothing traced: a new --workdir can be."
                        if setup.config.profile
                        else "."
                    )
                )
                return old_summary
            return train(setup, workdir, interrupt, old_summary)


def train(setup: Setup, workdir: pathlib.Path, interrupt: Interrupt, old_summary: dict) -> dict:
    """The run itself, in a workdir that the caller holds the lock of.

    Raises UserError where it is past the last step, or where the checkpoints that old_summary speaks of are gone.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    config, data, place, steps = setup.config, setup.data, setup.place, setup.functions
    identity = setup.data_fields
    is_main = jax.process_index() == 0
    total, batch_size, examples = config.steps, config.batch_size, len(data.train_images)
    per_epoch = examples // batch_size
    indices_of = functools.partial(
        order.train_indices,
        batch_size=batch_size,
        examples=examples,
        held_out=config.data.held_out,
        held_out_steps=config.data.held_out_steps,
    )

    # ---- State: restored where there is a checkpoint (on whatever mesh it was saved), else new; created sharded.
    run_name = (workdirs.read(workdir / "config.json") or {}).get("run") or secrets.token_hex(8)
    checkpoints = Checkpoints(workdir.resolve() / "checkpoints", config.checkpoint.keep, run_name)
    state = checkpoints.restore(steps.abstract_state)
    start = 0 if state is None else int(state.step)
    if state is None and old_summary.get("status") in (
        "completed",
        "interrupted",
    ):  # which both come after a save
        raise UserError(
            f"{workdir}: summary.json says that step {old_summary.get('steps')} was saved, but checkpoints/ holds "
            "none: put them back, or give a new --workdir to begin at step 0"
        )
    if start > total:
        raise UserError(
            f"steps={total}: {workdir} is at step {start} already; the number of steps may grow, not shrink"
        )
    if is_main:  # before anything takes long: a run that is stopped now can be started again
        runfiles.write_json(workdir / "config.json", setup.saved_config | dict(run=run_name))
        (workdir / "profile.json").unlink(
            missing_ok=True
        )  # of an earlier command, maybe on another mesh
    if start:
        say(f"Resumed {workdir} at step {start} on mesh {place.mesh_name}.")
    elif (workdir / "metrics.jsonl").exists():
        say(
            f"{workdir} has no checkpoint to go on from: starting again at step 0; the old metrics are kept as "
            f"{runfiles.aside(workdir / 'metrics.jsonl').name}."
        )

    # ---- Compile, and say what the program is.
    eval_every, save_every = (
        config.eval.every_epochs * per_epoch,
        config.checkpoint.every_epochs * per_epoch,
    )
    stops = sorted(
        {total}.union(*(range(every, total, every) for every in (eval_every, save_every) if every))
    )
    calls = plan(start, stops, config.steps_per_call)
    since, hits = time.perf_counter(), len(CACHE_HITS)
    programs = {n: compile_train(setup, n) for n in {config.steps_per_call, *calls}}
    train_feed, test_feed = feeds(setup)
    test_indices, masks = order.eval_indices(batch_size, len(data.test_images))
    masks = [put(mask, place.sharding(("conv_batch",), mask.shape)) for mask in masks]
    eval_program = (
        steps.jit_eval()
        .lower(steps.abstract_state, *test_feed.shapes(batch_size), masks[0])
        .compile()
    )
    report = report_of(
        setup, programs[config.steps_per_call], config.steps_per_call, time.perf_counter() - since
    ) | dict(programs_from_cache=len(CACHE_HITS) - hits)
    say(program.as_text(report))
    interrupt.check()

    # ---- The loop: calls of some steps each; evaluation and checkpoints fall between two calls.
    train_feed.load()
    test_feed.load()
    state = state if state is not None else steps.jit_init()()
    schedule, ends = (
        optim.make_schedule(config.optimizer, total, batch_size),
        [*itertools.accumulate(calls, initial=start)],
    )
    rates = dict(
        zip(ends, np.asarray(jax.vmap(schedule)(np.array(ends) - 1)), strict=True)
    )  # of the last step of each call
    metrics = metrics_lib.Metrics(workdir, start, identity, enabled=is_main)
    progress = metrics_lib.Progress(total, show=is_main)
    clock = Clock()
    step, eval_seconds, evaluation, startup = start, 0.0, None, None

    def record(end: int, values: dict, ended: concurrent.futures.Future) -> None:
        """Waits for the call that ends at step `end`."""
        nonlocal startup, step
        n = len(values["loss"])
        seconds = clock.tick(n, ended)
        losses, accuracies = np.asarray(values["loss"]), np.asarray(values["accuracy"])
        startup = startup or process_seconds()
        if not np.isfinite(losses).all():
            at = int(np.argmin(np.isfinite(losses)))
            bad, step = end - n + at + 1, end
            raise NonFinite(
                f"loss is {losses[at]} at step {bad} (learning rate {schedule(bad - 1):.4g})"
            )
        row = dict(
            loss=float(losses.mean()),
            accuracy=float(accuracies.mean()),
            images_per_second=n * batch_size / seconds,
        )
        metrics.write(
            end,
            "train",
            **row,
            learning_rate=float(rates[end]),
            steps=n,
            train_seconds=metrics.train_seconds + clock.seconds,
        )
        evals_left = 1 + ((total - 1) // eval_every - (end - 1) // eval_every if eval_every else 0)
        progress.update(
            end, **row, eta=(total - end) / clock.steps_per_second() + eval_seconds * evals_left
        )

    def evaluate(split: str) -> dict:
        nonlocal eval_seconds
        since = time.perf_counter()
        parts = []
        for inputs, mask in zip(test_feed.calls(test_indices), masks, strict=True):
            parts.append(eval_program(state, *inputs, mask))
            jax.block_until_ready(
                parts[-2:][0]
            )  # or all the images of the split would pile up on the devices
        result = evaluation_of(parts, len(data.test_images))
        eval_seconds = time.perf_counter() - since
        if not np.isfinite(result["loss"]):
            raise NonFinite(f"test loss is {result['loss']} after step {step}")
        metrics.write(step, split, **result)
        progress.say(
            f"step {step}/{total}  {split}: test accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f} "
            f"over {result['examples']} images"
        )
        return result

    def save(accuracy: float | None) -> None:
        if not all_finite(state.params):
            raise NonFinite(f"parameters are not finite after step {step}")
        if is_main and not (workdir / "config.json").exists():
            raise SaveError(
                f"{workdir}: was moved or removed while the run used it; step {step} is not saved; in the "
                "folder's new place, the same command goes on"
            )
        checkpoints.save(step, state, accuracy)

    def write_profile() -> None:
        """profile.json, from further calls whose results are thrown away; the state is used up."""
        n = config.steps_per_call
        inputs = train_feed.calls(indices_of(config.seed, at, n) for at in itertools.count(0, n))

        def call() -> dict:
            nonlocal state
            state, values = programs[n](state, *next(inputs))
            return values

        try:
            traced = profile.trace(
                call, -(-config.profile // n), n, workdir / "profile" / str(jax.process_index())
            )
            if is_main:
                runfiles.write_json(workdir / "profile.json", traced)
        except (ValueError, RuntimeError) as error:  # the run itself is whole
            progress.say(f"WARNING: there is no profile: {error}")

    def summarise(status: str) -> dict:
        summary = dict(
            experiment=config.experiment,
            **identity,
            data_on_device=report["data_on_device"],
            model=config.model.name,
            parallelism=config.parallelism,
            mesh=dict(place.mesh.shape),
            devices=place.mesh.size,
            device_kind=report["compiler"]["device_kind"],
            processes=jax.process_count(),
            batch_size=batch_size,
            steps=step,
            epochs=round(step / per_epoch, 3),
            seed=config.seed,
            dtype=config.dtype,
            param_count=report["param_count"],
            startup_seconds=startup,
            compile_seconds=report["compile_seconds"],
            programs_from_cache=report["programs_from_cache"],
            train_seconds=round(metrics.train_seconds + clock.seconds, 3),
            images_per_second=round(clock.steps_per_second() * batch_size, 1)
            if clock.calls
            else None,
            step_milliseconds=clock.step_milliseconds(),
            steady_calls=len(clock.steady()),
            eval=evaluation,
            bytes_per_device=report["bytes_per_device"],
            collectives=report["collectives"],
            **metrics_lib.provenance(),
            started=started,
            status=status,
            data_digest=data.digest,
            config=configs.as_json(config),
        )
        if is_main:
            runfiles.write_json(workdir / "summary.json", summary)
        return summary

    if is_main:
        runfiles.write_json(workdir / "program.json", identity | report)
    status = "failed"
    try:
        summarise("running")
        clock.start()
        # A call is recorded when the next one has begun, so that the devices need not wait for the host (with several processes
        # they do: these agree after each call whether a signal came).
        unread = None
        indices = (indices_of(config.seed, at, n) for at, n in zip(ends, calls, strict=False))
        for n, inputs in zip(calls, train_feed.calls(indices), strict=True):
            state, values = programs[n](state, *inputs)
            ended = clock.watch(values)
            step += n
            if unread:
                record(*unread)
            unread, interrupted = (step, values, ended), interrupt.requested()
            if step not in stops and not interrupted:
                continue
            record(*unread)
            unread = None
            if step == total:
                continue
            evaluation = (
                evaluate("eval")
                if eval_every and step % eval_every == 0 and not interrupted
                else None
            )
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
            if config.profile:
                write_profile()
            status = "completed"
    except NonFinite as error:
        checkpoints.close()
        status = "non-finite"
        raise NonFinite(f"{error}. Stopped; {checkpoints.last_good()}") from None
    finally:
        progress.close()
        metrics.close()
        if workdir.exists():
            summary = summarise(status)
    return summary


def dry_run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | None, devices: list | None = None
) -> dict:
    """Compiles the train step, prints the report and returns it; with a workdir, also writes it there as program.json.

    devices: those of a machine that is not here (target.py); None: the ones there are.
    """
    setup = prepare(config, devices)
    with contextlib.ExitStack() as stack:
        if workdir:
            stack.enter_context(workdirs.opened(workdir, setup.saved_config))
            if (workdir / "config.json").exists():
                raise UserError(
                    f"--workdir={workdir}: holds a run, which a dry run leaves alone: give a new folder"
                )
        since = time.perf_counter()
        n = setup.config.steps_per_call
        report = report_of(setup, compile_train(setup, n), n, time.perf_counter() - since)
        say(program.as_text(report))
        if workdir:
            runfiles.write_json(workdir / "program.json", setup.data_fields | report)
    return report


def plan(start: int, stops: list[int], steps_per_call: int) -> list[int]:
    """How many steps each call from step `start` on does, so that every stop (ascending) is the end of a call."""
    calls = []
    for stop in stops:
        while start < stop:
            calls.append(min(steps_per_call, stop - start))
            start += calls[-1]
    return calls


def evaluation_of(parts: list[dict], examples: int) -> dict[str, Any]:
    """accuracy and top5 (0 to 1), mean loss (nats) and examples, from eval_step's sums; all examples must be in them."""
    sums = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
    if sums["examples"] != examples:
        raise AssertionError(f"evaluated {sums['examples']} examples of {examples}")
    means = {name: total / examples for name, total in sums.items() if name != "examples"}
    return means | dict(examples=examples)


@jax.jit
def all_finite(params: nnx.State) -> jax.Array:
    """True where no parameter is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
