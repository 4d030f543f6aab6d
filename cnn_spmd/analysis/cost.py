"""Predict the time of a train step on a mesh, from a card's calibration.

  step  =  computing + update + exposed communication

  computing      the step of one device at the same batch per device, without its update: measured,
                 or estimated (roofline.py). Every scheme divides that evenly over all devices. Maps
                 that a device joins from parts of several devices cost JOIN_PASSES besides.
  update         `update_bytes` per weight that the device keeps, at the card's copy rate.
  communication  each collective of the closed form (communication.py), by a table of measured
                 times for its operation, its bytes and its span, and the card's `gap`. XLA's
                 schedule hides a part of those of weights, none of those of activations.

A card is a file in cards/. It comes from measurements of one GPU and of collectives between GPUs,
or from data sheets; its `sources` say which. docs/planning.md explains the model and its errors.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cnn_spmd.analysis import card_file
from cnn_spmd.config import JAX_SHARE
from cnn_spmd.errors import UserError

CARDS = pathlib.Path(__file__).parent / "cards"

# XLA for GPUs joins collectives of one operation up to this size: the default of its flag
# xla_gpu_all_reduce_combine_threshold_bytes and of those of gathers and reduce-scatters.
COMBINED_BYTES = 30 * 2**20

WEIGHT_BYTES = 4  # weights are float32

# A map that a device joins from parts of several devices costs this many reads or writes at the
# copy rate, beyond the step of one device. Four are copies before and after collectives. The others
# stand for narrower products and lower maps, which are slower. The least squares of relative errors
# give 13.4, on the profiles (compute_milliseconds) of `model` and `spatial` in
# results/data/sweeps/alexnet-224-2xh200-schemes.json.
JOIN_PASSES = 13

# From results/data/predictions/estimates.json, where a GPU's step was estimated and measured.
ESTIMATES_WITHIN = "on H100s and H200s, 9 of 10 estimates were within 12 % of the measured step"

# From the files of results/data/predictions on sweeps of H200s.
ERRORS = (
    "Errors for AlexNet at 224 pixels on 2 and 4 H200s of one host: at most 6 %, for fsdp up to "
    "15 %, for dense_2d on 2x2 up to 20 %, for model and spatial up to 12 %, for a variable batch "
    "under the hybrids and one_sum up to 9 %. For other networks, cards and hosts they are unknown"
)

# Operations without times of their own take those of the first one that a card has.
LIKE = {
    "collective-permute": ("collective-permute", "all-to-all", "all-gather"),
    "all-to-all": ("all-to-all", "all-gather"),
    "all-gather": ("all-gather",),
    "reduce-scatter": ("reduce-scatter", "all-gather"),
    "all-reduce": ("all-reduce",),
}


class Weights(NamedTuple):
    """What a step does with weights.

    network: the weights of the network. updated: the updates of single weights that a device does
    per step. ready: those of them whose gradient is not summed over devices. update_bytes: see
    `update_bytes` below. in_turn: the scheme gathers and sums the weights of one layer after
    another (the key gather_again).
    """

    network: float
    updated: float
    ready: float
    update_bytes: float
    in_turn: bool


class Terms(NamedTuple):
    """The parts of a predicted step, in seconds."""

    computing: float
    update: float
    communication: float  # all collectives, each by itself, without the card's gap
    exposed: float  # what the device waits for, gaps included

    @property
    def step(self) -> float:
        """Return the predicted time of the step."""
        return self.computing + self.update + self.exposed


@dataclasses.dataclass(frozen=True)
class Links:
    """What collectives cost between GPUs of one span: inside a host, or across hosts.

    collectives: operation -> points (ring bytes, seconds), ascending. Between points the time is
    linear; beyond the last it goes on with the last slope. Fewer bytes than the first point's take
    as long as those.
    """

    collectives: dict[str, list[tuple[float, float]]]

    def seconds(self, operation: str, ring_bytes: float, lanes: int = 1) -> float:
        """Return the time of a collective that sends `ring_bytes` per device in a ring.

        lanes: how many devices of the group send at once through links of their own.
        """
        points = next(
            self.collectives[name] for name in LIKE[operation] if name in self.collectives
        )
        return on_the_line(max(ring_bytes / lanes, points[0][0]), points)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a calibration comes from.

    device_kind: what JAX calls the card. sources: where the numbers come from, by field and span.
    measured: what python -m cnn_spmd.calibrate ran on, and with which versions.
    """

    name: str
    device_kind: str
    sources: dict[str, str]
    measured: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates(Origin):
    """How fast a card computes.

    memory: bytes. copy_rate: bytes/s, read plus written, of a large copy. matrix_rate: FLOP/s of a
    large product, in bfloat16 on GPUs; no prediction needs it. kernel_seconds: what a kernel takes
    besides its work. product_rates: points (width, FLOP/s) of products of 2-byte numbers; width is
    their number of rows or of columns, whichever is smaller. Without kernel_seconds and
    product_rates, no step can be estimated (roofline.py).
    """

    memory: float
    copy_rate: float
    matrix_rate: float | None = None
    kernel_seconds: float | None = None
    product_rates: Sequence[tuple[float, float]] = ()

    @property
    def usable_memory(self) -> float:
        """Return the bytes that JAX takes of the memory by default."""
        return JAX_SHARE * self.memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card(Rates):
    """The calibration of a card.

    gap: seconds by which a collective delays the step in addition to its own time. hidden_share:
    the share of its time that XLA hides of a sum of weights' gradients, with one collective in
    flight; hidden_gathers: of a gather of weights. spans: "host" and "cluster" -> Links; a span
    that nobody measured is missing. steps: measured steps of one device, each with the network's
    fields and points (batch, seconds).
    """

    gap: float
    hidden_share: float
    hidden_gathers: float = 0.0
    spans: dict[str, Links]
    steps: Sequence[dict] = ()


def on_the_line(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Return y at x on the line through points (x, y), ascending by x.

    Beyond the first and the last point the line goes on with its slope there.
    """
    xs, ys = np.transpose(points)
    inner = np.clip(np.searchsorted(xs, x), 1, len(xs) - 1)
    slope = (ys[inner] - ys[inner - 1]) / (xs[inner] - xs[inner - 1])
    return float(ys[inner] + (x - xs[inner]) * slope)


def names() -> list[str]:
    """Return the names of the cards in cards/."""
    return sorted(path.stem for path in CARDS.glob("*.json"))


def load(name: str) -> Card:
    """Return a card by its name in cards/, or by the path of its JSON file.

    Raises UserError for a name that has no calibration, and for a file that is no card.
    """
    path = CARDS / f"{name}.json" if name in names() else pathlib.Path(name)
    if not path.is_file():
        reason = "no such file" if path.suffix or path.parent.name else "no calibration"
        raise UserError(
            f"--card={name}: {reason}, expected one of {', '.join(names())} or a file of "
            "python -m cnn_spmd.calibrate"
        )
    fields = card_file.read(path)
    fields["spans"] = {span: Links(links) for span, links in fields["spans"].items()}
    return Card(name=path.stem, **fields)


def of_device(device_kind: str) -> Card | None:
    """Return the card of a JAX device, None where there is no calibration."""
    return next((card for card in map(load, names()) if card.device_kind == device_kind), None)


def predict(
    card: Card,
    one_device_seconds: float,
    weights: Weights,
    moves: Sequence[Mapping],
    mesh: Mapping[str, int],
    gpus_per_host: int,
    joined_bytes: float = 0.0,
) -> Terms:
    """Predict a step of a program on a mesh.

    one_device_seconds: the step of one device that holds all weights, at the same batch per device.
    moves: rows of communication.closed_form. mesh: devices by mesh axis; they fill one host after
    another. joined_bytes: of the maps that a device joins from parts of several devices.
    Raises UserError where the card has no times of a span of the mesh, and where its copy rate says
    that the update alone takes longer than the step.
    """
    whole, own, ready = (
        count * weights.update_bytes / card.copy_rate
        for count in (weights.network, weights.updated, weights.ready)
    )
    if whole > one_device_seconds:
        raise UserError(
            f"card {card.name}: at copy_rate={card.copy_rate:g} bytes per second the update of all "
            f"weights takes {1e3 * whole:.3f} ms, more than the whole step of one device, "
            f"{1e3 * one_device_seconds:.3f} ms: correct copy_rate or steps, or measure both with "
            "python -m cnn_spmd.calibrate"
        )
    total = exposed = sums = 0.0
    for move in combined(moves):
        devices = group(mesh, move["axes"])
        hosts = len(set(devices // gpus_per_host))
        seconds = move["count"] * collective_seconds(card, move, len(devices), hosts)
        delay = seconds + move["count"] * card.gap
        total += seconds
        if weights.in_turn or not is_of_weight(move):
            exposed += delay
        elif is_sum_of_gradients(move):
            sums += delay
        else:
            exposed += delay * (1 - card.hidden_gathers)
    # XLA runs the sums beside the update of weights that need no sum.
    exposed += max(0.0, sums - ready) * (1 - card.hidden_share)
    joining = JOIN_PASSES * joined_bytes / card.copy_rate
    return Terms(one_device_seconds - whole + joining, own, total, exposed)


def collective_seconds(card: Card, move: Mapping, devices: int, hosts: int) -> float:
    """Return the time of one collective of a row of the closed form over `devices` on `hosts`.

    Across hosts, the devices of one host send at once, each through a link of its own. Inside a
    host the bytes of a ring pass from device to device. The time is that of the slower span.
    Raises UserError where the card has no times of a span.
    """
    lanes = max(1, devices // hosts)
    # Span -> how many devices of the group send at once.
    spans = {"host": 1} if hosts == 1 or lanes > 1 else {}
    if hosts > 1:
        spans["cluster"] = lanes
    for span in spans:
        if span not in card.spans:
            raise UserError(
                f"card {card.name}: has no times of collectives of spans.{span}, expected a card "
                "measured on several devices, or one of " + ", ".join(names())
            )
    operation, size = move["operation"], move["ring_bytes"] / move["count"]
    return max(card.spans[span].seconds(operation, size, lanes) for span, lanes in spans.items())


def update_bytes(itemsize: int, state_bytes: float) -> float:
    """Return what the update of a weight reads and writes, in bytes.

    It reads and writes the weight and its optimizer state (`state_bytes`), and reads the gradient.
    In bfloat16 it also writes a copy of the weight for the next step. itemsize: bytes of the
    compute dtype, which gradient and copy have.
    """
    copied = itemsize < WEIGHT_BYTES
    return 2 * (WEIGHT_BYTES + state_bytes) + (1 + copied) * itemsize


def combined(moves: Sequence[Mapping]) -> Iterator[dict]:
    """Join the collectives of weights as XLA does: each up to COMBINED_BYTES."""
    waiting: dict[tuple, dict] = {}
    for move in map(dict, moves):
        if not is_of_weight(move):
            yield move
            continue
        key = move["operation"], tuple(move["axes"]), move["phase"], move["count"]
        joined = waiting.get(key)
        if joined and joined["bytes"] + move["bytes"] <= move["count"] * COMBINED_BYTES:
            joined["bytes"] += move["bytes"]
            joined["ring_bytes"] += move["ring_bytes"]
            continue
        if joined:
            yield waiting.pop(key)
        waiting[key] = move
    yield from waiting.values()


def is_of_weight(move: Mapping) -> bool:
    """Return whether a collective of theory moves a weight or its gradient."""
    return move["what"].endswith((".kernel", ".bias"))


def is_sum_of_gradients(move: Mapping) -> bool:
    """Return whether a collective of theory sums the gradient of a weight."""
    return is_of_weight(move) and move["operation"] in ("all-reduce", "reduce-scatter")


def group(mesh: Mapping[str, int], axes: Sequence[str]) -> np.ndarray:
    """Return the devices of the first group of a collective over these mesh axes."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    whole = tuple(slice(None) if axis in axes else 0 for axis in mesh)
    return ids[whole].ravel()
