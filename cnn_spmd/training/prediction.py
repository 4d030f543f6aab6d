"""Predict a step of a run's program before it is compiled, with the calibration of a card."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cnn_spmd import config as configs
from cnn_spmd.analysis import cost, layout, program, roofline
from cnn_spmd.analysis.communication import count_devices
from cnn_spmd.analysis.cost import Card, Terms
from cnn_spmd.data.feed import DeviceData
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh as meshes
from cnn_spmd.sharding.placement import Placement, is_dense, named_variables
from cnn_spmd.training import microbatch, program_report

# What a measured step on one device depends on, by its name in a card and by config field.
STEP_FIELDS = {
    "model": "model.name",
    "width": "model.width",
    "dtype": "dtype",
    "fast": "model.fast",
    "optimizer": "optimizer.name",
}


class OneDeviceStep(NamedTuple):
    """A step of one device, whether it is estimated, and in words where it comes from."""

    seconds: float
    is_estimated: bool
    origin: str


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a step costs on a mesh under a scheme; bytes are per device."""

    mesh: str
    parallelism: str
    batch_size: int
    terms: Terms
    alone: OneDeviceStep  # with the same batch per device
    ring_bytes: int
    memory: int
    fits: bool

    @property
    def speedup(self) -> float:
        """Return images/s over those of one device with the same batch per device."""
        data, model = map(int, self.mesh.split("x"))
        return data * model * self.alone.seconds / self.terms.step

    def as_json(self) -> dict:
        """Return the prediction as it stands in files."""
        milliseconds = {name: round(1e3 * time, 4) for name, time in self.terms._asdict().items()}
        return dict(
            mesh=self.mesh,
            parallelism=self.parallelism,
            batch_size=self.batch_size,
            predicted_milliseconds=round(1e3 * self.terms.step, 4),
            speedup=round(self.speedup, 3),
            terms=milliseconds,
            estimated=self.alone.is_estimated,
            ring_bytes=self.ring_bytes,
            memory_bytes=self.memory,
            fits=self.fits,
        )


def predict(
    setup: Any, card: Card, gpus_per_host: int, alone: OneDeviceStep | None = None
) -> Prediction:
    """Predict a step of a Setup (setup.py), which is not compiled.

    alone: what one_device_step has returned for the same network, card and batch per device.
    Raises UserError where the closed form does not cover the network under the scheme, and where
    the card has neither a step of this network nor the rates that an estimate needs.
    """
    config, place = setup.config, setup.place
    moves, reason = program_report.theory_of(setup)
    if moves is None:
        raise UserError(f"parallelism={config.parallelism}: has no prediction: {reason}")
    alone = alone or one_device_step(card, setup)
    terms = terms_of(setup, card, moves, alone.seconds, gpus_per_host)
    sent, memory = sum(move["ring_bytes"] for move in moves), memory_of(setup)
    asked = place.mesh_name, config.parallelism, config.batch_size
    fits = memory + setup.image_bytes_per_device <= card.usable_memory
    return Prediction(*asked, terms, alone, sent, memory, fits)


def terms_of(
    setup: Any, card: Card, moves: Sequence[dict], one_device_seconds: float, gpus_per_host: int
) -> Terms:
    """Return the parts of a predicted step.

    moves: rows of communication.closed_form. one_device_seconds: the step of one device at the same
    batch per device.
    """
    weights = weights_of(setup, moves)
    mesh = setup.place.mesh.shape
    joined = joined_bytes(setup)
    return cost.predict(card, one_device_seconds, weights, moves, mesh, gpus_per_host, joined)


def joined_bytes(setup: Any) -> float:
    """Return the bytes of the maps that a device joins from parts of several devices.

    A map whose rows are split counts with its halo. One whose channels are gathered counts whole,
    and once more as the part that the device sends: XLA copies both. Nothing counts where each
    device has towers of its own (two_tower): two H200s computed no slower than one.
    """
    place, itemsize = setup.place, setup.itemsize
    if place.mesh_axes("group_in"):
        return 0.0
    layers = layout.layers_of(place, setup.activations, setup.variables, itemsize)
    held = {
        each[0]: layout.activation_of(place, *each, itemsize).bytes for each in setup.activations
    }
    halos = [name for name in held if layout.is_halo(name)]
    joined = sum(held[name] + held[name.removesuffix("halo") + "input"] for name in halos)
    for before, layer in itertools.pairwise(layers):
        gathered = {*before.output.features} - layer.input.axes
        if before.output.is_map and gathered:
            joined += layer.input.bytes * (1 + 1 / count_devices(place.mesh, gathered))
    return joined


def repeats_work(setup: Any) -> bool:
    """Return whether several devices compute the same part of a layer, for the same examples.

    No prediction counts such work: computing is taken as evenly divided over the devices. setup:
    one that `predict` covers.
    """
    layers = layout.layers_of(setup.place, setup.activations, setup.variables, setup.itemsize)
    mesh = setup.place.mesh
    return any(
        count_devices(mesh, layer.input.shared | {*layer.rows, *layer.columns}) < mesh.size
        for layer in layers
        if layer.weights
    )


def weights_of(setup: Any, moves: Sequence[dict]) -> cost.Weights:
    """Return what a step does with weights. moves: rows of communication.closed_form."""
    config, state = setup.config, setup.functions.abstract_state
    of_network, of_optimizer = (
        sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)
        for tree in (state.params, state.optimizer)
    )
    state_bytes = cost.WEIGHT_BYTES * of_optimizer / of_network
    each = microbatch.updates_each(setup.functions.microbatch)
    dense_updates = config.batch_size // config.dense_microbatch if each else 1
    summed = {move["what"] for move in moves if cost.is_sum_of_gradients(move)}
    updated = ready = 0.0
    for name, weight in named_variables(state.params):
        updates = dense_updates if is_dense(weight) else 1
        count = updates * program.bytes_per_device(weight) / cost.WEIGHT_BYTES
        updated += count
        ready += 0.0 if name in summed else count
    update_bytes = cost.update_bytes(setup.itemsize, state_bytes)
    in_turn = "gather_again" in setup.place.row
    return cost.Weights(of_network, updated, ready, update_bytes, in_turn)


def one_device_step(card: Card, setup: Any) -> OneDeviceStep:
    """Return the step of one device at a Setup's batch per device, measured or estimated.

    Raises UserError where the card has neither.
    """
    batch = setup.config.batch_size / setup.place.mesh.size
    if measured := measured_step(card, setup, batch):
        return measured
    origin = (
        "ESTIMATED from the card's rates, as it has no measured step of this network; "
        f"{cost.ESTIMATES_WITHIN}"
    )
    seconds = estimated_step(card, setup, math.ceil(batch))
    return OneDeviceStep(seconds, is_estimated=True, origin=origin)


def measured_step(card: Card, setup: Any, batch: float) -> OneDeviceStep | None:
    """Return the step of one device on `batch` examples, by the card's calibration.

    Between the batches that were measured the time is linear; beyond them it goes on so. A single
    measured batch is scaled. None where the card has no step of this network.
    """
    wanted = network_of(setup)
    for step in card.steps:
        if all(step[name] == value for name, value in wanted.items()):
            points = step["points"]
            line = points if len(points) > 1 else [(0.0, 0.0), *points]
            origin = _origin(batch, [size for size, _ in points])
            return OneDeviceStep(cost.on_the_line(batch, line), False, origin)
    return None


def _origin(batch: float, batches: Sequence[float]) -> str:
    """Say how the step at `batch` follows from steps measured at `batches`."""
    least, most = batches[0], batches[-1]
    if least <= batch <= most:
        return "from measured steps of this network on one device"
    if len(batches) == 1:
        return f"scaled from a step measured on {least:,g} images on one device"
    return f"extrapolated from steps measured on {least:,g} to {most:,g} images on one device"


def network_of(setup: Any) -> dict[str, Any]:
    """Return what a measured step on one device depends on."""
    fields = {name: configs.get(setup.config, field) for name, field in STEP_FIELDS.items()}
    return fields | dict(image_size=setup.image_size, classes=len(setup.data.class_names))


def estimated_step(card: Card, setup: Any, batch: int) -> float:
    """Return the seconds of a step of one device on `batch` examples, by the card's rates.

    The step is traced on one device, and not compiled. A variable batch is left out.
    Raises UserError where the card has no rates.
    """
    if not card.product_rates or card.kernel_seconds is None:
        fields = ", ".join(f"{name}={value}" for name, value in network_of(setup).items())
        raise UserError(
            f"card {card.name}: has no measured step of {fields}, and neither kernel_seconds nor "
            "product_rates to estimate one: run python -m cnn_spmd.calibrate mine.json on such a "
            "GPU, and give --card mine.json"
        )
    return roofline.seconds(roofline.kernels_of(trace_step(setup, batch)), card)


def trace_step(setup: Any, batch: int) -> Any:
    """Return the program of a train step of one device on `batch` images, as JAX traces it."""
    one = meshes.make(1, 1, devices=[setup.place.mesh.devices.flat[0]])
    functions = dataclasses.replace(setup.functions, place=Placement(one, "data"), microbatch=None)
    images = jax.ShapeDtypeStruct((batch, *setup.data.train_images.shape[1:]), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def step(state, large, data, rate):
        weights = functions.weights(large, state.params)
        state, values = functions.train_step(state, data, None, rate, weights)
        return state, values, functions.cast(state.params)

    state = jax.eval_shape(functions.init, np.uint32(0))
    large = jax.eval_shape(functions.cast, state.params)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.make_jaxpr(step)(state, large, DeviceData(images, labels), rate)


def memory_of(setup: Any) -> int:
    """Estimate the bytes that a device holds at most during a step.

    These are weights and optimizer state as they lie between steps, the activations that the
    backward pass needs, and the weights in use or their gradients, in the compute dtype. With
    gather_again only the largest layer's weights are there at once. Left out are the images of a
    data set that stays on the devices: data.resident=auto gives them a share of the memory.
    """
    abstract, place = setup.functions.abstract_state, setup.place
    layers = layout.layers_of(place, setup.activations, setup.variables, setup.itemsize)
    in_use = [sum(weight.bytes for weight in layer.weights.values()) for layer in layers]
    activations = sum(
        place.report(*each, setup.itemsize)["bytes_per_device"] for each in setup.activations
    )
    at_rest = sum(map(program.bytes_per_device, (abstract.params, abstract.optimizer)))
    weights = max(in_use) if place.row.get("gather_again") else sum(in_use)
    return at_rest + activations + weights


def of_devices(setup: Any, estimate: bool = True) -> dict | None:
    """Return the prediction for a Setup's devices, JSON-ready; None where there is none.

    The card is the config's, or the one that ships for the devices. There is no prediction for
    devices without a card, and none where the closed form does not cover the network. estimate:
    False leaves out a prediction for which JAX must trace a step, which may take seconds.
    Raises UserError for a config's card that is none.
    """
    mesh = setup.place.mesh
    card = card_of(setup.config, mesh.devices.flat[0].device_kind)
    batch = setup.config.batch_size / mesh.size
    if card is None or not (estimate or measured_step(card, setup, batch)):
        return None
    hosts = len({device.process_index for device in mesh.devices.flat})
    try:
        found = predict(setup, card, max(mesh.size // hosts, 1))
    except UserError:
        return None
    return dict(card=card.name) | found.as_json()


def card_of(config: ml_collections.ConfigDict, device_kind: str) -> Card | None:
    """Return the config's card, or the one of the devices; None where they have none.

    Raises UserError for a config's card that is none.
    """
    return cost.load(config.card) if config.card else cost.of_device(device_kind)
