"""Train: a run, from its config to its summary.

A run goes from stop to stop. A stop is a step after which the run evaluates, saves, or is complete.
Between two stops the devices work through chunks. A chunk is the steps of one compiled call
(`steps_per_call`): the host launches one call for many steps, and logs a chunk while the devices
work on the next one.

- A run evaluates every `eval.every_epochs` epochs, and after its last step. With `noise_scale` it
  then measures the gradient's noise, too.
- It saves a checkpoint every `checkpoint.every_epochs` epochs, and after its last step.
- A signal (SIGTERM, Ctrl-C, SIGHUP) ends it after the chunks that are launched, at most two: it
  saves, and the same command resumes. If an evaluation was due, the resumed run does it.
- A loss that is not finite ends it. So does a parameter or a model state that is not finite; they
  are tested before each save, and never saved.
- A run starts from its seed, or from the weights of the file `init_from`.
- A run that is started again restores the TrainState of its newest checkpoint: step, seed,
  parameters, model state and optimizer state. The mesh, the scheme and a few other fields may
  differ (config.py, MAY_DIFFER); another change of the config is refused.
- After a kill that nothing announced, the steps since the newest checkpoint are done again. Without
  a checkpoint the run begins at step 0.
"""

import concurrent.futures
import datetime
import pathlib
import time

import jax
import ml_collections
import numpy as np

from cnn_spmd.analysis import program
from cnn_spmd.data import registry
from cnn_spmd.data.dataset import Dataset, Unread
from cnn_spmd.training import build, cluster, initial, prediction, resume
from cnn_spmd.training.checkpoint import Checkpoints, SaveError
from cnn_spmd.training.interrupt import Interrupt
from cnn_spmd.training.log import Log, about_run
from cnn_spmd.training.noise_scale import NoiseScale
from cnn_spmd.training.profiling import profile_chunks
from cnn_spmd.training.programs import Programs, compile_programs
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.step import TrainState
from cnn_spmd.training.terminal import say
from cnn_spmd.training.timetable import Chunk, Timetable, make_timetable
from cnn_spmd.training.workdir import LOCK, has_checkpoint, locked_run, write_run_file


class NonFinite(RuntimeError):
    """A loss or the state is not finite; the run ends and keeps its checkpoints."""


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path | str,
    data: Dataset | Unread | None = None,
) -> dict:
    """Train the run of `config` in `workdir`, or resume it; return its summary.

    The summary is what summary.json holds. data: a data set to take in place of the config's, or
    the config's, where it is found already.
    In another thread than the main one, a run does not handle signals.
    Raises UserError for bad input, before anything is compiled; KeyboardInterrupt for a signal
    before the first step; NonFinite if training diverges; SaveError if a save fails.
    """
    workdir = pathlib.Path(workdir)

    def refuse_early(setup: Setup) -> None:
        """Refuse a state beyond memory, a folder in use, a bad init_from; no image is read yet."""
        build.refuse_beyond_memory(setup)
        with locked_run(workdir, setup.saved_config):
            if not has_checkpoint(workdir):
                setup.start_weights()

    if data is not None:
        data = registry.checked(config.data, lambda: data)
    setup = build.prepare(config, data=data, check=refuse_early)
    build.say_choices(config, setup)
    with Interrupt() as interrupt:  # from here on, a signal is noted and does not kill
        interrupt.raise_if_requested()
        with locked_run(workdir, setup.saved_config) as old_summary:
            cluster.same_folder(workdir, workdir / LOCK)
            if resume.is_complete(setup, workdir, old_summary):
                return old_summary

            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            # Orbax reads each array straight into its shards on this mesh.
            checkpoints, state = resume.restore(setup, workdir, old_summary)
            start = 0 if state is None else int(state.step)
            if state is None:
                origin = setup.start_weights()
            else:
                origin = initial.Start({}, old_summary.get("init_from"))
            resume.write_config(setup, workdir, old_summary, checkpoints.run_name, start)

            timetable = make_timetable(setup.config, len(setup.data.train_images), start)
            say("Compiling ...")
            programs = compile_programs(setup, timetable.chunks)
            say(program.as_summary(programs.report | dict(dataset=setup.shown_data)))
            interrupt.raise_if_requested()

            if state is None:
                if origin.text:
                    say(origin.text)
                state = origin.put_into(programs.init(np.uint32(setup.config.seed)))
            parts = resume.parts(setup, old_summary, start)
            origins = dict(started=started, init_from=origin.record, parts=parts)
            run = Run(setup, workdir, timetable, programs, checkpoints, state, interrupt, origins)
            return run.train()


class Run:
    """A run in progress: the state after step `step`, and what it needs to go on."""

    def __init__(
        self,
        setup: Setup,
        workdir: pathlib.Path,
        timetable: Timetable,
        programs: Programs,
        checkpoints: Checkpoints,
        state: TrainState,
        interrupt: Interrupt,
        origins: dict,  # of the summary: started, init_from (the first weights) and parts
    ):
        self.setup, self.workdir, self.timetable = setup, workdir, timetable
        self.programs, self.checkpoints, self.interrupt = programs, checkpoints, interrupt
        self.state, self.step = state, timetable.start
        self.interrupted = False
        self.evaluation: dict | None = None  # of the state, if it was evaluated at the last stop
        self.origins = origins
        self.log = Log(setup, workdir, timetable)
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.step_time: concurrent.futures.Future | None = None  # as predicted
        self.noise_scale = NoiseScale(setup) if setup.config.noise_scale else None
        self.chunks = setup.inputs(timetable.chunks)

    def train(self) -> dict:
        """Go through the timetable; return the summary, which says how the run ended.

        The files of `summary` are written at the beginning and at the end, after an error too.
        """
        status = "failed"
        try:
            self.summary("running")
            status = self.run_to_the_end()
        except NonFinite as error:
            self.checkpoints.close()
            status = "non-finite"
            raise NonFinite(f"{error}. Stopped; {self.checkpoints.last_good()}") from None
        finally:
            try:
                self.log.close()
            finally:
                summary = self.summary(status)
        return summary

    def run_to_the_end(self) -> str:
        """Run from stop to stop; return "completed", or "interrupted" after a signal."""
        # A signal may have ended the earlier command before it evaluated this step. Or this was the
        # last step of a shorter run, and is one of a longer run's evaluations.
        if self.step in self.timetable.evaluations and not self.log.is_evaluated:
            self.evaluation = self.evaluate("eval")
            self.checkpoints.record_accuracy(self.step, self.evaluation["accuracy"])
        for stop in self.timetable.stops:
            self.run_until(stop)
            if self.step == self.timetable.last:  # complete, even if a signal came
                break
            if self.interrupted:
                self.evaluation = None
                self.save()
                self.checkpoints.close()
                return "interrupted"
            evaluate = self.step in self.timetable.evaluations
            self.evaluation = self.evaluate("eval") if evaluate else None
            if self.step in self.timetable.saves:
                self.save()

        self.evaluation = self.evaluate("final")
        # Without stops the last step is saved already: an earlier command was killed after that.
        if self.timetable.stops:
            self.save()
        self.checkpoints.close()
        if self.setup.config.profile:
            profile_chunks(self.setup, self.programs, self.state, self.workdir)
        return "completed"

    def run_until(self, stop: int) -> None:
        """Run chunks until step `stop`, or until a signal has come; at least one chunk.

        The host records a chunk while the next one runs, so that the devices do not wait for the
        host. In a cluster they do wait: after each chunk the processes agree whether a signal came.
        """
        self.log.clock.start()
        running = None
        while self.step < stop and not self.interrupted:
            chunk, inputs = next(self.chunks)
            train_chunk = self.programs.train[chunk.steps]  # one program for each length of a chunk
            self.state, metrics = train_chunk(self.state, *inputs)
            self.predict_step_time()
            ended_at = self.log.clock.watch(metrics)
            self.step = chunk.end
            if running:
                self.record(*running)
            running = chunk, metrics, ended_at
            self.interrupted = self.interrupt.requested()
        self.record(*running)

    def predict_step_time(self) -> None:
        """Begin to predict how long a step takes, in a thread, unless that is done.

        JAX may have to trace a step for that, while the devices train.
        """
        if self.step_time is None and self.programs.report["prediction"] is None:
            self.step_time = self.thread.submit(prediction.of_devices, self.setup)

    def record(self, chunk: Chunk, metrics: dict, ended_at: concurrent.futures.Future) -> None:
        """Wait until a chunk ends, and log it.

        Raises NonFinite for a loss that is not finite.
        """
        seconds = self.log.clock.finish(chunk.steps, ended_at)
        metrics = {name: np.asarray(values) for name, values in metrics.items()}
        finite = np.isfinite(metrics["loss"])
        if not finite.all():
            self.step = chunk.end  # the steps of a chunk that runs already do not count
            first = int(np.argmin(finite))  # the first False
            steps_before = chunk.start + first
            (rate,) = self.setup.rates(steps_before, 1)
            raise NonFinite(
                f"loss is {metrics['loss'][first]} at step {steps_before + 1} "
                f"(learning rate {rate:.4g})"
            )
        self.log.chunk(chunk, metrics, seconds)

    def evaluate(self, split: str) -> dict:
        """Evaluate the state on the test data, log and return the metrics by name.

        Measure the noise scale, too, if the config asks for it.
        split: what the log calls it, "eval" or "final". Raises NonFinite for a test loss that is
        not finite.
        """
        since = time.perf_counter()
        metrics = self.programs.evaluate(self.state)
        seconds = time.perf_counter() - since
        if not np.isfinite(metrics["loss"]):
            raise NonFinite(f"test loss is {metrics['loss']} after step {self.step}")
        self.log.evaluation(self.step, split, metrics, seconds)
        if self.noise_scale:
            self.log.noise_scale(self.step, self.noise_scale.measure(self.state))
        return metrics

    def save(self) -> None:
        """Begin to save the state, with the accuracy of its evaluation, if there was one.

        A separate thread writes the checkpoint while training goes on. Raises NonFinite for a
        state that is not finite, SaveError if the folder of the run is gone.
        """
        if not self.programs.all_finite((self.state.params, self.state.model_state)):
            raise NonFinite(f"parameters are not finite after step {self.step}")
        if jax.process_index() == 0 and not (self.workdir / "config.json").exists():
            raise SaveError(
                f"{self.workdir}: was moved or removed while the run used it; step {self.step} is "
                "not saved; to go on, give the folder's new place as --workdir"
            )
        accuracy = self.evaluation["accuracy"] if self.evaluation else None
        self.checkpoints.save(self.step, self.state, accuracy)

    def summary(self, status: str) -> dict:
        """Write program.json and summary.json, unless the workdir is gone; return the latter."""
        report = self.programs.report
        if self.step_time:
            try:
                report["prediction"] = self.step_time.result()
            except Exception as error:  # of tracing the network for one device: the run is fine
                say(f"warning: no step time is predicted: {type(error).__name__}: {error}")
        summary = dict(
            **about_run(self.setup, report, self.step),
            **self.log.speed(),
            eval=self.evaluation,
            **self.origins,
            status=status,
        )
        if self.workdir.exists():
            write_run_file(self.workdir / "program.json", self.setup.data_fields | report)
            write_run_file(self.workdir / "summary.json", summary)
        return summary
