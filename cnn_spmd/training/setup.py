"""Hold a resolved config and what it stands for: data, placement, programs, inputs of a step."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from cnn_spmd import config as configs
from cnn_spmd.analysis import program
from cnn_spmd.data import order, streaming
from cnn_spmd.data.dataset import Dataset
from cnn_spmd.data.feed import Feed, Resident, put
from cnn_spmd.data.sharded import Sharded
from cnn_spmd.errors import UserError
from cnn_spmd.sharding.placement import Placement, named_variables
from cnn_spmd.training import initial, optim, prediction, program_report
from cnn_spmd.training.step import StepFunctions, TrainState
from cnn_spmd.training.terminal import say
from cnn_spmd.training.timetable import Chunk, split_into_chunks

RATES = 2**16  # the devices compute the learning rates of this many steps at a time
PLANNED_STEPS = 10  # the host looks through a run's indices, this many steps at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A resolved config and what it stands for.

    `functions` are the pure step functions, `place` puts arrays on the mesh.
    """

    config: ml_collections.ConfigDict
    data: Dataset
    place: Placement
    functions: StepFunctions
    memory: float | None = None  # bytes that each device can hold; None where nobody knows
    # By their number, blocks of RATES learning rates.
    _rates: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    # By the number of steps. Dicts, as a cached_property would not be safe in threads.
    _lowered: dict[int, jax.stages.Lowered] = dataclasses.field(default_factory=dict)
    _train_programs: dict[int, jax.stages.Compiled] = dataclasses.field(default_factory=dict)

    def init(self) -> TrainState:
        """Return the state at step 0, already sharded; init_from may give its weights."""
        start = self.start_weights()  # which may raise, before anything is compiled
        if start.text:
            say(start.text)
        return start.put_into(self.functions.jit_init()(np.uint32(self.config.seed)))

    def start_weights(self) -> initial.Start:
        """Return what a run starts from. Raises UserError where init_from does not fit."""
        config, shapes = self.config, self.functions.abstract_state
        return initial.read(config.init_from, config.model.name, shapes, self.data.class_names)

    def train(self, state: TrainState, steps: int) -> tuple[TrainState, dict[str, np.ndarray]]:
        """Train for `steps` steps; return the new state, and loss and accuracy [steps].

        `state` is used up: its memory becomes that of the new state. Evaluation, checkpoints and
        files are those of cnn_spmd.train.
        """
        if steps < 1:
            raise UserError(f"steps={steps}: expected at least 1")
        self.feeds[0].load()
        start = int(state.step)
        chunks = split_into_chunks(start, [start + steps], self.config.steps_per_call)
        metrics = []
        for chunk, inputs in self.inputs(chunks):
            state, values = self.train_program(chunk.steps)(state, *inputs)
            metrics.append(jax.tree.map(np.asarray, values))
        return state, jax.tree.map(lambda *values: np.concatenate(values), *metrics)

    def report(self) -> dict:
        """Return what the compiled train step holds and moves, JSON-ready.

        That is the placement, bytes per device, collectives beside the closed form, and the
        predicted time of a step; analysis.program.as_text turns it into lines to print.
        """
        n, since = self.config.steps_per_call, time.perf_counter()
        compiled = self.train_program(n)
        seconds = round(time.perf_counter() - since, 2)
        return self.report_on(compiled, n) | dict(compile_seconds=seconds)

    def report_on(self, compiled: jax.stages.Compiled, n: int, estimate: bool = True) -> dict:
        """Return what `report` does, for a program of n steps that is compiled already.

        estimate: as for prediction.of_devices.
        """
        kind = self.place.mesh.devices.flat[0].device_kind
        card = prediction.card_of(self.config, kind)
        # A card of the config may stand for other devices than these.
        memory = self.memory or (card.usable_memory if card else None)
        more = dict(device_memory_bytes=memory, prediction=prediction.of_devices(self, estimate))
        return program_report.report_of(self, compiled, n) | more

    @functools.cached_property
    def activations(self) -> list[tuple[str, tuple, tuple]]:
        """Return (name, logical axes, shape) of each layer's input and output, in order.

        Raises UserError where one is not divisible as the scheme asks.
        """
        return program_report.layouts_of_activations(self)

    @functools.cached_property
    def variables(self) -> list[tuple[str, nnx.Variable]]:
        """Return (name, abstract variable) of each parameter, and of the model state."""
        abstract = self.functions.abstract_state
        return named_variables(abstract.params) + named_variables(abstract.model_state)

    @functools.cached_property
    def feeds(self) -> tuple[Feed, Feed]:
        """Return the training split and the test split, as the programs take them."""
        data, resident = self.data, self.config.data.resident
        train = self.place, data.train_images, data.train_labels
        test = self.place, data.test_images, data.test_labels
        if resident == "no":
            return streaming.Streamed(*train), streaming.Streamed(*test)
        if resident == "yes" or self.place.mesh.size == 1:
            return Resident(*train), Resident(*test)
        test_indices, _ = order.eval_indices(self.config.batch_size, len(data.test_images))
        return Sharded(*train, self._run_indices), Sharded(*test, lambda: [test_indices])

    def indices(self, start: int, steps: int) -> np.ndarray:
        """Return which training images the steps from `start` on see, int32 [steps, B]."""
        config, examples = self.config, len(self.data.train_images)
        held_out = config.data.held_out, config.data.held_out_steps
        return order.train_indices(
            config.seed, start, steps, config.batch_size, examples, *held_out
        )

    def rates(self, start: int, steps: int) -> np.ndarray:
        """Return the learning rates of the steps from `start` on, [steps]."""
        first, last = start // RATES, (start + steps - 1) // RATES
        for block in range(first, last + 1):
            if block not in self._rates:
                # One program: otherwise XLA would compile each operation of a schedule by itself.
                rates = jax.jit(jax.vmap(self.schedule))(np.arange(RATES) + block * RATES)
                self._rates[block] = np.asarray(rates, jnp.result_type(float))
        blocks = [self._rates[block] for block in range(first, last + 1)]
        return np.concatenate(blocks)[start - first * RATES :][:steps]

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        """Return the learning rate by step."""
        config = self.config
        return optim.make_schedule(config.optimizer, config.steps, config.batch_size)

    def inputs(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, tuple]]:
        """Yield each chunk, and what its program takes beside the state.

        That is data, indices and learning rates. A thread prepares the data of a chunk while the
        chunk before it runs.
        """
        chunks, of_calls = itertools.tee(chunks)
        calls = self.feeds[0].calls(self.indices(chunk.start, chunk.steps) for chunk in of_calls)
        for chunk, call in zip(chunks, calls, strict=True):
            rates = put(self.rates(chunk.start, chunk.steps), self.place.replicated)
            yield chunk, (*call, rates)

    def _run_indices(self) -> Iterator[np.ndarray]:
        """Yield which training images the steps of the run see, at least one chunk, as [S, B]."""
        steps = max(self.config.steps, self.config.steps_per_call)
        for chunk in split_into_chunks(0, [steps], PLANNED_STEPS):
            yield self.indices(chunk.start, chunk.steps)

    def train_program(self, n: int) -> jax.stages.Compiled:
        """Return the compiled program of n train steps; it is compiled once."""
        if n not in self._train_programs:
            lowered = self.lower_train(n)
            self._train_programs[n] = lowered.compile(compiler_options=self.compiler_options)
        return self._train_programs[n]

    def lower_train(self, n: int) -> jax.stages.Lowered:
        """Return the program of n train steps, ready to be compiled; it is traced once."""
        if n not in self._lowered:
            inputs = self.feeds[0].shapes(n, self.config.batch_size)
            rates = jax.ShapeDtypeStruct(
                (n,), jnp.result_type(float), sharding=self.place.replicated
            )
            jitted = self.functions.jit_train()
            self._lowered[n] = jitted.lower(self.functions.abstract_state, *inputs, rates)
        return self._lowered[n]

    @property
    def compiler_options(self) -> dict[str, int]:
        """Return what the train step's program is compiled with, beside XLA's defaults.

        XLA builds a schedule from its end. With one collective in flight, only what no other
        collective waits for may stand between a start and its done. So XLA leaves the gradients of
        the dense layers to the end, and nothing hides their all-reduces.

        XLA joins gathers that can start together. The first micro-batch would then wait for the
        inputs of all.
        """
        config, mesh, options = self.config, self.place.mesh, {}
        if mesh.size == 1 or mesh.devices.flat[0].platform == "cpu":
            return options
        if config.collectives_in_flight > 1:
            limit = "xla_gpu_experimental_parallel_collective_overlap_limit"
            options[limit] = config.collectives_in_flight
        if config.dense_microbatch:
            options["xla_gpu_all_gather_combine_threshold_bytes"] = 1
        return options

    def lower_init(self) -> jax.stages.Lowered:
        """Return the program that makes the state at step 0 from a seed."""
        return self.functions.jit_init().lower(np.uint32(self.config.seed))

    def lower_evaluation(self) -> jax.stages.Lowered:
        """Return the program that evaluates one batch of test images."""
        batch_size = self.config.batch_size
        mask = jax.ShapeDtypeStruct(
            (batch_size,), bool, sharding=self.place.sharding(("conv_batch",), (batch_size,))
        )
        inputs = self.feeds[1].shapes(batch_size)
        return self.functions.jit_eval().lower(self.functions.abstract_state, *inputs, mask)

    def lower_all_finite(self) -> jax.stages.Lowered:
        """Return the program that tests whether parameters and model state are finite."""
        state = self.functions.abstract_state
        return jax.jit(all_finite).lower((state.params, state.model_state))

    @property
    def image_bytes_per_device(self) -> int:
        """Return the bytes of images that each device holds during a whole run."""
        resident, devices = self.config.data.resident, self.place.mesh.size
        return configs.image_bytes_per_device(resident, self.data, devices)

    @property
    def streamed_bytes_per_device(self) -> int:
        """Return the bytes of images that a device receives from the host for each step."""
        if self.config.data.resident != "no":
            return 0
        images = self.feeds[0].shapes(self.config.batch_size)[0].images
        return program.bytes_per_device(images)

    @property
    def image_size(self) -> int:
        """Return the side of what the network sees of an image, in pixels."""
        return self.config.data.crop or self.data.train_images.shape[1]

    @property
    def itemsize(self) -> int:
        """Return the bytes of a number of the compute dtype."""
        return jnp.dtype(self.config.dtype).itemsize

    @property
    def data_fields(self) -> dict:
        """Return what each file of a run says of its data.

        That is the data set, the one that it stands in for, how many images are left out, and how
        many test images are held out of the training images.
        """
        counts = dict(
            skipped_images=self.data.skipped, test_images_from_train=self.data.test_from_train
        )
        counts = {name: count for name, count in counts.items() if count}
        return dict(dataset=self.data.name, fallback=self.data.fallback) | counts

    @property
    def shown_data(self) -> str:
        """Return what messages call the data set."""
        return configs.shown_data(self.config, self.data.name)

    @property
    def saved_config(self) -> dict:
        """Return what config.json holds: the config, the data set and its digests."""
        of_data = dict(data_files=self.data.files, data_digest=self.data.digest)
        known = {field: value for field, value in of_data.items() if value}
        return configs.as_json(self.config) | self.data_fields | known


def all_finite(arrays: Any) -> jax.Array:
    """Return whether all elements of a tree of arrays are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays)]).all()
