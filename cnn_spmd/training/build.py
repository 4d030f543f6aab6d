"""From a config to what is trained, on what and where; the compiled train step, and the report on it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from cnn_spmd import config as configs
from cnn_spmd import models
from cnn_spmd.analysis import communication, coverage, program
from cnn_spmd.data import dataset, statistics
from cnn_spmd.data import registry as sources
from cnn_spmd.data.feed import Feed
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh as meshes
from cnn_spmd.sharding.placement import Placement, name_of
from cnn_spmd.training import cluster, optim
from cnn_spmd.training.log import say
from cnn_spmd.training.step import Steps


class Setup(NamedTuple):
    """What is trained, on what, where: a resolved config and what it stands for."""

    config: ml_collections.ConfigDict
    data: dataset.Dataset
    place: Placement
    steps: Steps

    @property
    def identity(self) -> dict:
        """Says what each file of a run says of its data.

        That is the data set, the one that it stands in for, and how many images are left out.
        """
        skipped = dict(skipped_images=self.data.skipped) if self.data.skipped else {}
        return dict(dataset=self.data.name, fallback=self.data.fallback) | skipped

    @property
    def saved(self) -> dict:
        """Gives what config.json holds: config, data set, digests of its files and pixels."""
        of_data = dict(data_files=self.data.files, data_digest=self.data.digest)
        known = {field: value for field, value in of_data.items() if value}
        return configs.as_json(self.config) | self.identity | known


def prepare(
    config: ml_collections.ConfigDict,
    devices: list | None = None,
    data: dataset.Dataset | None = None,
    check: Callable[[Setup], object] = lambda _: None,
) -> Setup:
    """Mesh, data, model and step functions of a config. Every UserError but those of the workdir is raised here.

    devices: None are the ones there are; data: the config's, where it is loaded already; check: sees what is returned, and
    before photographs are decoded the same with black ones: what it refuses is refused before that takes its time.
    """
    configs.validate(config)
    place = Placement(
        meshes.make(config.mesh.data, config.mesh.model, devices),
        config.parallelism,
        config.placement.to_dict(),
    )
    memory = device_memory(place)

    def assemble(data: dataset.Dataset) -> Setup:
        setup = _assemble(config, place, memory, data)
        check(setup)
        return setup

    data = data or sources.load(config.data, assemble)
    setup = assemble(data)
    cluster.agree(setup.saved)  # each process decides on the fallback by itself
    return setup


def _assemble(
    config: ml_collections.ConfigDict, place: Placement, memory: float | None, data: dataset.Dataset
) -> Setup:
    """What `prepare` gives. Raises UserError for what does not go together."""
    config = configs.resolve(config, data, place.mesh.devices.flat[0].platform, memory)
    config.mesh.data, config.mesh.model = place.mesh.shape.values()
    if data.fallback:
        say(f"For {data.name}: {configs.values_on_fallback(config)}.")
    place.spec(("conv_batch",), (config.batch_size,), "batch_size")
    setup = Setup(config, data, place, make_steps(config, data, place))
    setup.steps.activations(config.batch_size, image_size(config, data))
    setup.steps.abstract_state  # noqa: B018  (placed here for its errors)
    return setup


def image_size(config: ml_collections.ConfigDict, data: dataset.Dataset) -> int:
    """The side of what the network sees of an image, in pixels."""
    return config.data.crop or data.train_images.shape[1]


def device_memory(place: Placement) -> float | None:
    """Bytes that each device of the mesh can hold; None where that is not told."""
    stats = None
    with contextlib.suppress(RuntimeError):  # of devices that are not here
        device = next(
            device
            for device in place.mesh.devices.flat
            if device.process_index == jax.process_index()
        )
        stats = device.memory_stats()
    memory = float((stats or {}).get("bytes_limit", 0))
    return min(cluster.exchange(memory)) or None  # all must come to the same


def refuse_beyond_memory(setup: Setup) -> None:
    """Raises UserError where a run's state, or a call's images, do not fit into memory."""
    config, data, place, steps = setup
    machine, here = configs.machine_memory(), place.mesh.local_devices
    of_a_device = (here[0].memory_stats() or {}).get("bytes_limit") or machine / len(here)
    abstract = steps.abstract_state
    state = sum(map(program.bytes_per_device, (abstract.params, abstract.optimizer)))
    fields = f"model.name={config.model.name}, model.width={config.model.width}"
    configs.refuse_beyond(of_a_device, state, f"{fields}, per device")
    if config.data.resident == "no":
        fields = f"steps_per_call={config.steps_per_call}, batch_size={config.batch_size}"
        images = min(config.steps_per_call, config.steps) * config.batch_size
        configs.refuse_beyond(machine, images * data.train_images[0].nbytes, fields)


def make_steps(config: ml_collections.ConfigDict, data: dataset.Dataset, place: Placement) -> Steps:
    """The step functions of a resolved config. Raises UserError for what does not go together."""
    make_model = functools.partial(
        models.make,
        config.model.name,
        image_size=image_size(config, data),
        classes=len(data.class_names),
        width=config.model.width,
        dropout=config.model.dropout,
        dtype=jnp.dtype(config.dtype),
        levers=tuple(config.model.levers),
    )
    model = nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0)))
    if place.row.get("group_in") and model.towers == 1:
        raise UserError(
            f"parallelism={place.parallelism}: splits towers, but model.name={config.model.name} has one: "
            "expected alexnet_2012 or another parallelism"
        )
    layers = nnx.state(model, nnx.Param)
    for field in ("weight_decays", "layer_rates"):
        for layer in config.optimizer[field]:
            if layer not in layers:
                raise UserError(
                    f"optimizer.{field}.{layer}: model.name={config.model.name} has no such layer, "
                    f"expected some of {', '.join(layers)}"
                )
    if config.data.flip and not data.mirror:
        say(
            f"data.flip=True has no effect: a mirrored image of {data.name} is another class, or none."
        )
    dense_optimizer = None
    if config.dense_microbatch:
        parts, rest = divmod(config.batch_size, config.dense_microbatch)
        if rest:
            raise UserError(
                f"dense_microbatch={config.dense_microbatch}: does not divide batch_size={config.batch_size}"
            )
        place.spec(("conv_batch",), (config.dense_microbatch,), "dense_microbatch")
        if config.dense_updates == "each":
            dense_optimizer = optim.make_optimizer(
                config.optimizer, config.steps, config.batch_size, parts
            )
    sample = statistics.sample(data.train_images)
    if config.data.normalise == "channel":
        mean, std = statistics.channel_statistics(sample)
    else:
        mean, std = statistics.mean_image(sample, config.data.crop), 1.0
    colour_CC = (
        config.data.colour_noise * statistics.colour_axes(sample)
        if config.data.colour_noise
        else None
    )
    halves = config.dtype == "bfloat16" and "cast_once" in config.model.levers
    return Steps(
        make_model=lambda rngs: make_model(rngs=rngs),
        place=place,
        mean=mean,
        std=std,
        optimizer=optim.make_optimizer(config.optimizer, config.steps, config.batch_size),
        dense_optimizer=dense_optimizer,
        dense_microbatch=config.dense_microbatch,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        crop=config.data.crop,
        crop_pad=config.data.crop_pad,
        colour_CC=colour_CC,
        flip=config.data.flip and data.mirror,
        views=config.eval.views,
        mirror=data.mirror,
        halves=halves,
    )


def feeds(setup: Setup) -> tuple[Feed, Feed]:
    """The training and the test split, as the programs take them."""
    data, resident = setup.data, setup.config.data.resident == "yes"
    return (
        Feed(setup.place, data.train_images, data.train_labels, resident),
        Feed(setup.place, data.test_images, data.test_labels, resident),
    )


def compile_train(setup: Setup, n: int) -> jax.stages.Compiled:
    """The program of n train steps, from shapes alone."""
    inputs = feeds(setup)[0].shapes(n, setup.config.batch_size)
    return setup.steps.jit_train().lower(setup.steps.abstract_state, *inputs).compile()


def report_of(setup: Setup, compiled: jax.stages.Compiled, n: int, compile_seconds: float) -> dict:
    """Report what a compiled program of n steps holds, and moves in a step.

    JSON-ready: placement, memory, collectives, and theory beside them. No error of the report ends a run:
    then what is not known is null or empty, and `error`, which is not there otherwise, says why.
    """
    config, place, abstract = setup.config, setup.place, setup.steps.abstract_state
    report = dict(
        parallelism=config.parallelism,
        devices=place.mesh.size,
        model=config.model.name,
        batch_size=config.batch_size,
        dtype=config.dtype,
        **setup.identity,
        data_on_device=config.data.resident == "yes",
        param_count=sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
        placement=[],
        activations=[],
        bytes_per_device=dict(parameters=None, optimizer=None),
        closed_form=None,
        closed_form_not_covered=None,
        communication=None,
        closed_form_ring_bytes=None,
        compile_seconds=round(compile_seconds, 2),
        **program.compiler_of(place.mesh),
        **program.UNKNOWN,
    )
    try:
        for part in _parts_of_report(setup, compiled, n):
            report |= part
    except Exception as error:
        report["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    return report


def _parts_of_report(setup: Setup, compiled: jax.stages.Compiled, n: int) -> Iterator[dict]:
    """Give the parts of the report one by one, so that an error leaves those before it."""
    config, data, place, steps = setup
    abstract = steps.abstract_state
    leaves = jax.tree_util.tree_leaves_with_path(
        abstract.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    params = [(name_of(path), leaf) for path, leaf in leaves]
    activations = steps.activations(config.batch_size, image_size(config, data))
    itemsize = jnp.dtype(config.dtype).itemsize
    yield dict(
        placement=[
            place.report(name, leaf.axes, leaf.shape, leaf.dtype.itemsize) for name, leaf in params
        ],
        activations=[place.report(*activation, itemsize) for activation in activations],
        bytes_per_device=dict(
            parameters=program.bytes_per_device(abstract.params),
            optimizer=program.bytes_per_device(abstract.optimizer),
        ),
    )
    found = program.report(compiled, place.mesh, n)
    yield found
    collectives = found["collectives"]
    network = nnx.eval_shape(lambda: steps.make_model(nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct(
        (config.batch_size, *2 * [image_size(config, data)], 3), jnp.float32
    )
    theory = None
    reason = coverage.covers(place, network, images, activations, params, collectives)
    if reason is None:
        dense_updates = (
            1 if steps.dense_optimizer is None else config.batch_size // config.dense_microbatch
        )
        theory = communication.closed_form(place, activations, params, itemsize, dense_updates)
    yield dict(
        closed_form=theory,
        closed_form_not_covered=reason,
        communication=communication.compare(collectives, theory),
        closed_form_ring_bytes=None if theory is None else sum(row["ring_bytes"] for row in theory),
    )
