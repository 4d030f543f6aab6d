"""Turn a config into a Setup: what is trained, on what data, and where."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from cnn_spmd import config as configs
from cnn_spmd import models
from cnn_spmd.analysis import program
from cnn_spmd.data import order, registry, statistics, streaming
from cnn_spmd.data.augment import Preprocessing
from cnn_spmd.data.dataset import Dataset, Unread
from cnn_spmd.data.feed import Feed, Resident, put
from cnn_spmd.data.sharded import Sharded
from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import LEVERS
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.placement import (
    Placement,
    axes_of,
    is_weight,
    mesh_axes_of,
    named_variables,
)
from cnn_spmd.training import (
    cluster,
    initial,
    microbatch,
    optim,
    prediction,
    program_report,
    startup,
)
from cnn_spmd.training.step import StepFunctions, TrainState
from cnn_spmd.training.terminal import say
from cnn_spmd.training.timetable import Chunk, split_into_chunks

RATES = 2**16  # the devices compute the learning rates of this many steps at a time
PLANNED_STEPS = 10  # the host looks through a run's indices, this many steps at a time
# Of an image's side, at least this share is in a crop that nobody asked for. The smallest share in
# the recipes is 24 of 32 pixels (Krizhevsky 2012, 11pct).
LEAST_CROP = 0.75

# Mean and deviation per channel, in pixel values, of the images that torchvision's pre-trained
# networks were trained on (torchvision.transforms._presets.ImageClassification).
TORCHVISION_MEAN = tuple(255 * mean for mean in (0.485, 0.456, 0.406))
TORCHVISION_STD = tuple(255 * std for std in (0.229, 0.224, 0.225))


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
        config = self.config
        return initial.read(config.init_from, config.model.name, self.functions.abstract_state)

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
        # The devices of a target are not here; their card has the data sheet's memory.
        memory = self.memory or (card.memory if card else None)
        more = dict(device_memory_bytes=memory, prediction=prediction.of_devices(self, estimate))
        return program_report.report_of(self, compiled, n) | more

    @functools.cached_property
    def activations(self) -> list[tuple[str, tuple, tuple]]:
        """Return (name, logical axes, shape) of each layer's input and output, in order.

        Raises UserError where one is not divisible as the scheme asks.
        """
        classes = len(self.data.class_names)
        return program_report.layouts_of_activations(
            self.functions, self.config.batch_size, self.image_size, classes
        )

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
        config = self.config
        return order.train_indices(
            config.seed,
            start,
            steps,
            config.batch_size,
            len(self.data.train_images),
            config.data.held_out,
            config.data.held_out_steps,
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
        """
        at_once, mesh = self.config.collectives_in_flight, self.place.mesh
        if at_once == 1 or mesh.size == 1 or mesh.devices.flat[0].platform == "cpu":
            return {}
        return {"xla_gpu_experimental_parallel_collective_overlap_limit": at_once}

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
    def saved_config(self) -> dict:
        """Return what config.json holds: the config, the data set and its digests."""
        of_data = dict(data_files=self.data.files, data_digest=self.data.digest)
        known = {field: value for field, value in of_data.items() if value}
        return configs.as_json(self.config) | self.data_fields | known


def all_finite(arrays: Any) -> jax.Array:
    """Return whether all elements of a tree of arrays are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays)]).all()


def prepare(
    config: ml_collections.ConfigDict,
    devices: list | None = None,
    data: Dataset | Unread | None = None,
    check: Callable[[Setup], object] = lambda _: None,
    levers: Sequence[str] | None = None,
) -> Setup:
    """Return the Setup of a config: mesh, data, network and step functions.

    devices: None stands for all that JAX finds. data: the config's data set, where registry.find
    has found it already. check: called with the finished Setup. It is also called once before
    photographs are decoded, with zeros of the same shape, so that a bad config fails in seconds.
    levers: the fast forms to use, instead of all or none as model.fast says (layers/common.py); for
    benchmarks.
    Raises UserError for all that is wrong in a config, except for its workdir.
    """
    configs.validate(config)
    sizes = config.mesh.to_dict().values()
    rows = config.placement.to_dict()
    place = Placement(mesh.make(*sizes, devices=devices), config.parallelism, rows)
    memory = device_memory(place)
    if devices is None:
        startup.background("memory", reserve_memory, place)
    assemble = functools.partial(_assemble, config, place, memory, levers, check)
    if data is None:
        with startup.stage("data"):
            data = registry.find(config.data)
    data = registry.read(config.data, data, assemble)
    data = data.with_validation(config.data.validation)
    with startup.stage("network"):
        setup = assemble(data)
    say_without_effect(setup)
    cluster.agree(setup.saved_config)  # each process decides on the fallback by itself
    return setup


def _assemble(
    config: ml_collections.ConfigDict,
    place: Placement,
    memory: float | None,
    levers: Sequence[str] | None,
    check: Callable[[Setup], object],
    data: Dataset,
) -> Setup:
    """Return the Setup on this data, checked.

    Raises UserError for what does not go together.
    """
    platform = place.mesh.devices.flat[0].platform
    config = ml_collections.ConfigDict(config.to_dict())
    side = data.train_images.shape[1]
    config.data.crop = config.data.crop or crop_to_fit(config.model.name, side)
    config = configs.resolve(config, data, platform, memory, place.mesh.size)
    config.mesh.update(place.mesh.shape)
    if data.fallback:
        say(f"For {data.name}: {configs.values_on_fallback(config)}.")
    place.spec(("conv_batch",), (config.batch_size,), "batch_size")
    setup = Setup(config, data, place, make_functions(config, data, place, levers), memory)
    _ = setup.activations, setup.functions.abstract_state, setup.schedule  # for their errors
    check(setup)
    return setup


def crop_to_fit(network: str, side: int) -> int:
    """Return the largest crop that a network takes of images of `side` pixels.

    0 means the whole image. That is also the answer where a crop would leave out too much: then the
    network refuses the images.
    """
    sides = models.SIDES.get(network, (side,))
    if side in sides:
        return 0
    return max((each for each in sides if LEAST_CROP * side <= each < side), default=0)


def say_crop(asked: ml_collections.ConfigDict, setup: Setup) -> None:
    """Say which crop was chosen, if the config that was asked for has none."""
    crop, network = setup.config.data.crop, asked.model.name
    if crop != asked.data.crop:
        sides = " or ".join(map(str, models.SIDES[network]))
        side = setup.data.train_images.shape[1]
        say(
            f"data.crop={crop}: model.name={network} takes images of {sides} pixels, not of {side}."
        )


def say_without_effect(setup: Setup) -> None:
    """Say which entries of the config change nothing here, a line each."""
    config, place = setup.config, setup.place
    if config.data.flip and not setup.data.mirror:
        say(
            f"data.flip=True has no effect: a mirrored image of {setup.data.name} is another "
            "class, or none."
        )
    if config.collectives_in_flight > 1 and not setup.compiler_options:
        say(
            f"collectives_in_flight={config.collectives_in_flight} has no effect: it is an option "
            "of XLA for several GPUs."
        )
    split = set()  # the logical axes that are split further at rest than in use
    for weight in jax.tree.leaves(setup.functions.abstract_state.params, is_leaf=is_weight):
        axes = axes_of(weight)
        specs = place.spec(axes, weight.shape), place.spec_at_rest(axes, weight.shape)
        for axis, used, rest in zip(axes, *map(mesh_axes_of, specs), strict=True):
            if used != rest:
                split.add(axis)
    own_row = config.placement.to_dict().get(config.parallelism, {})
    for axis, mesh_axes in own_row.get("at_rest", {}).items():
        if axis not in split and place.devices_on(place.row["at_rest"][axis]) > 1:
            say(
                f"placement.{config.parallelism}.at_rest.{axis}={mesh_axes} has no effect: on mesh "
                f"{place.mesh_name} it splits no weight of {config.model.name} beyond its use."
            )


def reserve_memory(place: Placement) -> None:
    """Let JAX take the memory of its GPUs, as it otherwise does when the first array comes.

    That takes a second or two, in which the host has other work.
    """
    for device in place.mesh.local_devices:
        jax.device_put(np.uint8(0), device).block_until_ready()


def device_memory(place: Placement) -> float | None:
    """Return the bytes that each device of the mesh can hold; None where nobody knows."""
    stats = None
    with contextlib.suppress(RuntimeError):  # of devices that are not here
        process = jax.process_index()
        device = next(d for d in place.mesh.devices.flat if d.process_index == process)
        stats = device.memory_stats()
    memory = float((stats or {}).get("bytes_limit", 0))
    return min(cluster.exchange(memory)) or None  # all processes must decide alike


def refuse_beyond_memory(setup: Setup) -> None:
    """Raise UserError where a run's state, a shard or streamed images do not fit in memory."""
    config, machine = setup.config, configs.machine_memory()
    per_device = setup.memory or machine / len(setup.place.mesh.local_devices)
    abstract = setup.functions.abstract_state
    state = sum(map(program.bytes_per_device, (abstract.params, abstract.optimizer)))
    fields = f"model.name={config.model.name}, model.width={config.model.width}"
    configs.refuse_beyond(per_device, state, f"{fields}, per device")
    if config.data.resident == "sharded":
        fields = f"data.resident=sharded, mesh {setup.place.mesh_name}, per device"
        configs.refuse_beyond(per_device, setup.image_bytes_per_device, fields)
    if config.data.resident == "no":
        fields = f"steps_per_call={config.steps_per_call}, batch_size={config.batch_size}"
        steps = min(streaming.BUFFERS * config.steps_per_call, config.steps)
        needed = steps * config.batch_size * setup.data.train_images[0].nbytes
        configs.refuse_beyond(machine, needed, fields)


def make_functions(
    config: ml_collections.ConfigDict,
    data: Dataset,
    place: Placement,
    levers: Sequence[str] | None = None,
) -> StepFunctions:
    """Return the step functions of a resolved config.

    Raises UserError for what does not go together.
    """
    if levers is None:
        levers = LEVERS if config.model.fast else ()
    make_model = functools.partial(
        models.make,
        config.model.name,
        image_size=config.data.crop or data.train_images.shape[1],
        classes=len(data.class_names),
        width=config.model.width,
        dropout=config.model.dropout,
        batch_norm=config.model.batch_norm,
        dtype=jnp.dtype(config.dtype),
        levers=tuple(levers),
    )
    functions = StepFunctions(
        make_model=lambda rngs: make_model(rngs=rngs),
        preprocessing=make_preprocessing(config, data),
        make_optimizer=functools.partial(optim.make_optimizer, config.optimizer),
        place=place,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        microbatch=make_microbatch(config, place),
        carry_bf16=config.dtype == "bfloat16" and "carry_bf16" in levers,
    )
    refuse_mismatch(config, place, functions.abstract_model)
    return functions


def refuse_mismatch(config: ml_collections.ConfigDict, place: Placement, model: Any) -> None:
    """Raise UserError where the scheme or a rate by layer does not fit the network."""
    if place.mesh_axes("group_in") and getattr(model, "towers", 1) == 1:
        raise UserError(
            f"parallelism={place.parallelism}: splits towers, but "
            f"model.name={config.model.name} has one: expected alexnet_2012 or another parallelism"
        )
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.RngState)):
        raise UserError(
            f"model.name={config.model.name}: {'.'.join(map(str, path))} holds random numbers, "
            "expected dropout by classify's dropout_key (layers/dense.py, dropout)"
        )
    layers = nnx.state(model, nnx.Param)
    for field in ("weight_decays", "layer_rates"):
        for layer in config.optimizer[field]:
            if layer not in layers:
                raise UserError(
                    f"optimizer.{field}.{layer}: model.name={config.model.name} has no such layer, "
                    f"expected some of {', '.join(layers)}, or none by "
                    f"--config.optimizer.{field}={{}}"
                )


def make_preprocessing(config: ml_collections.ConfigDict, data: Dataset) -> Preprocessing:
    """Return what is done to images, with statistics of the training set."""
    if config.data.normalise == "channel":
        mean, std = data.channel_statistics
    elif config.data.normalise == "torchvision":
        mean, std = map(np.float32, (TORCHVISION_MEAN, TORCHVISION_STD))
    else:
        sample = statistics.sample(data.train_images)
        mean, std = statistics.mean_image(sample, config.data.crop), 1.0
    colour_CC = None
    if config.data.colour_noise:
        axes_CC = statistics.colour_axes(statistics.sample(data.train_images))
        colour_CC = config.data.colour_noise * axes_CC
    return Preprocessing(
        mean=mean,
        std=std,
        crop=config.data.crop,
        crop_pad=config.data.crop_pad,
        flip=config.data.flip and data.mirror,
        colour_CC=colour_CC,
        views=config.eval.views,
        mirror=data.mirror,
    )


def make_microbatch(
    config: ml_collections.ConfigDict, place: Placement
) -> microbatch.Settings | None:
    """Return how the dense layers see the batch; None: all of it at once.

    Raises UserError where the micro-batch divides the batch or the mesh unevenly.
    """
    size = config.dense_microbatch
    if not size:
        return None
    if config.batch_size % size:
        raise UserError(f"dense_microbatch={size}: does not divide batch_size={config.batch_size}")
    place.spec((place.features_batch,), (size,), "dense_microbatch")
    return microbatch.Settings(size, config.dense_updates)
