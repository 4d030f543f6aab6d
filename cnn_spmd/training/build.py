"""Turn a config into a Setup: what is trained, on what data, and where."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from cnn_spmd import config as configs
from cnn_spmd import models
from cnn_spmd.analysis import cost, program
from cnn_spmd.data import registry, statistics, streaming
from cnn_spmd.data.augment import Preprocessing
from cnn_spmd.data.dataset import Dataset, Unread
from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import FAST_FORMS
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.placement import Placement, axes_of, is_weight, mesh_axes_of
from cnn_spmd.training import cluster, microbatch, optim, startup
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.step import StepFunctions
from cnn_spmd.training.terminal import say

# Of an image's side, at least this share is in a crop that nobody asked for. The smallest share in
# the recipes is 24 of 32 pixels (Krizhevsky 2012, 11pct).
LEAST_CROP = 0.75
# More epochs than this are hardly meant: the longest recipe has 450 (cuda_convnet_cifar.py:11pct).
MANY_EPOCHS = 1000

# Mean and deviation per channel, in pixel values, of the images that torchvision's pre-trained
# networks were trained on (torchvision.transforms._presets.ImageClassification).
TORCHVISION_MEAN = tuple(255 * mean for mean in (0.485, 0.456, 0.406))
TORCHVISION_STD = tuple(255 * std for std in (0.229, 0.224, 0.225))


def prepare(
    config: ml_collections.ConfigDict,
    devices: list | None = None,
    data: Dataset | Unread | None = None,
    check: Callable[[Setup], object] = lambda _: None,
    fast_forms: Sequence[str] | None = None,
    memory: float | None = None,
) -> Setup:
    """Return the Setup of a config: mesh, data, network and step functions.

    devices: None stands for all that JAX finds. data: a data set to take in place of the config's,
    or the config's, where registry.find has found it already. check: called with the finished
    Setup. It is also called once before photographs are decoded, with zeros of the same shape, so
    that a bad config fails in seconds. fast_forms: those to use, instead of all or none as
    model.fast says (layers/common.py); for benchmarks. memory: bytes that each device can hold,
    where the devices stand for others.
    Raises UserError for all that is wrong in a config, except for its workdir.
    """
    configs.validate(config)
    sizes = config.mesh.to_dict().values()
    rows = config.placement.to_dict()
    place = Placement(mesh.make(*sizes, devices=devices), config.parallelism, rows)
    memory = memory or device_memory(place)
    if devices is None:
        for device in place.mesh.local_devices:
            startup.background("memory", reserve_memory, device)
    assemble = functools.partial(_assemble, config, place, memory, fast_forms, check)
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
    fast_forms: Sequence[str] | None,
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
    setup = Setup(config, data, place, make_functions(config, data, place, fast_forms), memory)
    _ = setup.activations, setup.functions.abstract_state, setup.schedule  # for their errors
    optim.refuse_other_updates(config.optimizer, setup.functions.abstract_state.params)
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


def say_choices(asked: ml_collections.ConfigDict, setup: Setup) -> None:
    """Say what the config that was asked for leaves open, and warn of very many epochs.

    That is which test images were held out, and which crop was chosen.
    """
    config, data = setup.config, setup.data
    name = setup.shown_data
    if data.test_from_train:
        say(
            f"{name} has nothing to test on: {data.test_from_train:,} of its images are held out "
            "for that, the same ones in every run."
        )
    epochs = config.steps // (len(data.train_images) // config.batch_size)
    if asked.steps and epochs > MANY_EPOCHS:
        say(
            f"warning: {config.steps:,} steps are {epochs:,} epochs of {name}; "
            "--config.steps=0 --config.epochs=N trains N epochs"
        )
    crop, network = config.data.crop, asked.model.name
    if crop != asked.data.crop:
        sides = " or ".join(map(str, models.SIDES[network]))
        side = data.train_images.shape[1]
        say(
            f"data.crop={crop}: model.name={network} takes images of {sides} pixels, not of {side}."
        )


def say_without_effect(setup: Setup) -> None:
    """Say which entries of the config change nothing here, a line each."""
    config, place = setup.config, setup.place
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
    for axis, mesh_axes in own_row.items():
        # Other logical axes are of the batch or of images, which each step has.
        is_of_weights = axis.endswith(("_in", "_out"))
        if is_of_weights and axis not in place.used and place.splits(axis):
            say(
                f"placement.{config.parallelism}.{axis}={mesh_axes} has no effect: on mesh "
                f"{place.mesh_name} it splits no array of {config.model.name}."
            )
    for axis, mesh_axes in own_row.get("at_rest", {}).items():
        if axis not in split and place.devices_on(place.row["at_rest"][axis]) > 1:
            say(
                f"placement.{config.parallelism}.at_rest.{axis}={mesh_axes} has no effect: on mesh "
                f"{place.mesh_name} it splits no weight of {config.model.name} beyond its use."
            )


def reserve_memory(device: jax.Device) -> None:
    """Let JAX take the memory of a GPU, as it otherwise does when the first array comes.

    That takes two seconds on an H200. Meanwhile the host has other work.
    """
    jax.device_put(np.uint8(0), device).block_until_ready()


def device_memory(place: Placement) -> float | None:
    """Return the bytes that each device of the mesh can hold; None where nobody knows."""
    process = jax.process_index()
    device = next(d for d in place.mesh.devices.flat if d.process_index == process)
    try:
        stats = device.memory_stats() or {}
    except RuntimeError:  # the device is not here, as with --target
        card = cost.of_device(device.device_kind)
        stats = dict(bytes_limit=card.usable_memory) if card else {}
    memory = float(stats.get("bytes_limit", 0))
    return min(cluster.exchange(memory)) or None  # all processes must decide alike


def refuse_beyond_memory(setup: Setup) -> None:
    """Raise UserError where a run's state or its images do not fit in memory."""
    config, machine = setup.config, configs.machine_memory()
    per_device = setup.memory or machine / len(setup.place.mesh.local_devices)
    abstract = setup.functions.abstract_state
    state = sum(map(program.bytes_per_device, (abstract.params, abstract.optimizer)))
    fields = f"model.name={config.model.name}, model.width={config.model.width}"
    configs.refuse_beyond(per_device, state, f"{fields}, per device")
    if config.data.resident != "no":
        fields = f"data.resident={config.data.resident}, mesh {setup.place.mesh_name}, per device"
        configs.refuse_beyond(per_device, setup.image_bytes_per_device, fields)
    else:
        fields = f"steps_per_call={config.steps_per_call}, batch_size={config.batch_size}"
        steps = min(streaming.BUFFERS * config.steps_per_call, config.steps)
        needed = steps * config.batch_size * setup.data.train_images[0].nbytes
        configs.refuse_beyond(machine, needed, fields)


def make_functions(
    config: ml_collections.ConfigDict,
    data: Dataset,
    place: Placement,
    fast_forms: Sequence[str] | None = None,
) -> StepFunctions:
    """Return the step functions of a resolved config.

    Raises UserError for what does not go together.
    """
    if fast_forms is None:
        fast_forms = FAST_FORMS if config.model.fast else ()
    make_model = functools.partial(
        models.make,
        config.model.name,
        image_size=config.data.crop or data.train_images.shape[1],
        classes=len(data.class_names),
        width=config.model.width,
        dropout=config.model.dropout,
        batch_norm=config.model.batch_norm,
        dtype=jnp.dtype(config.dtype),
        fast_forms=tuple(fast_forms),
    )
    functions = StepFunctions(
        make_model=lambda rngs: make_model(rngs=rngs),
        preprocessing=make_preprocessing(config, data),
        make_optimizer=functools.partial(optim.make_optimizer, config.optimizer),
        place=place,
        label_smoothing=config.label_smoothing,
        microbatch=make_microbatch(config, place),
        carry_bf16=config.dtype == "bfloat16" and "carry_bf16" in fast_forms,
    )
    refuse_mismatch(config, place, functions.abstract_model)
    return functions


def refuse_mismatch(config: ml_collections.ConfigDict, place: Placement, model: Any) -> None:
    """Raise UserError where the scheme or a rate by layer does not fit the network."""
    if place.mesh_axes("group_in") and getattr(model, "towers", 1) == 1:
        raise UserError(
            f"parallelism={place.parallelism}: splits towers, but "
            f"model.name={config.model.name} has one: expected a network of several, such as "
            "alexnet_2012 (a network of your own has towers = 2 in its class), or another "
            "parallelism"
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
    for axis in (place.features_batch, "dense_batch", "output_batch"):
        place.spec((axis,), (size,), "dense_microbatch")
    return microbatch.Settings(size, config.dense_updates)
