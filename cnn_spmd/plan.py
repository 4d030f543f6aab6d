"""Predict what a step costs on each mesh and under each scheme, and choose.

Nothing is compiled: bytes come from the closed form (analysis/communication.py), times from the
card's calibration (analysis/cost.py). The devices only stand for places in a mesh, so that a laptop
plans for any number of GPUs.
"""

import contextlib
import io
import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import ml_collections

from cnn_spmd.analysis import cost, program
from cnn_spmd.analysis.cost import Card
from cnn_spmd.config import AUTO, IMAGE_SIZE
from cnn_spmd.data.dataset import Dataset, Unread, blank_arrays
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh as meshes
from cnn_spmd.sharding.table import ALL, TABLE
from cnn_spmd.training import build
from cnn_spmd.training.prediction import Prediction, one_device_step, predict

MOST_ROWS = 30  # of a plan's printed table
COLUMNS = 100  # of a plan's sentences
# Data set -> training images, test images, pixels per side, classes. Sources: Krizhevsky 2009;
# Russakovsky et al. 2015 (their sides differ, and the config's data.image_size scales them).
SIZES = {"cifar10": (50_000, 10_000, 32, 10), "imagenet2012": (1_281_167, 50_000, 0, 1000)}


class Plan(NamedTuple):
    """What the planner found.

    title: for whom. predictions: the fastest first, and those that do not fit in memory last.
    refused: "MESH SCHEME" -> why it has no prediction.
    """

    title: str
    predictions: list[Prediction]
    refused: dict[str, str]


def plan(
    config: ml_collections.ConfigDict,
    data: Dataset | Unread,
    card: Card | None,
    gpus_per_host: int,
    mesh: str = AUTO,
) -> Plan:
    """Predict a step on each mesh over all of JAX's devices, under each scheme.

    config: its batch_size is the global batch. Its parallelism is the only scheme to look at, or
    "auto" for all. card: of the devices, None where they have no calibration. mesh: the only mesh,
    or "auto" for all.
    Raises UserError where nothing has a prediction, or nothing fits in memory.
    """
    devices = jax.devices()
    if card is None:
        raise UserError(
            f"--card: {devices[0].device_kind} has no calibration: make one with "
            "python -m cnn_spmd.calibrate, and give its file as --card, or give one of "
            f"{', '.join(cost.names())}"
        )
    names = meshes.shapes_over(len(devices)) if mesh == AUTO else [mesh]
    schemes = [config.parallelism]
    if config.parallelism == AUTO:
        schemes = list(dict.fromkeys([*TABLE, *config.placement]))
    found, refused, alone = [], {}, None
    for name, scheme in itertools.product(names, schemes):
        asked = config.copy_and_resolve_references()
        asked.parallelism = scheme
        asked.mesh.update(meshes.parse(name))
        if alone:  # statistics of the images take time, and change nothing from here on
            asked.data.update(normalise="channel", colour_noise=0.0)
        try:
            # An estimated step needs the fast forms of a run. What moves does not depend on them,
            # and JAX traces the plain ones faster.
            levers = () if alone else None
            # What has no effect is the same everywhere, and is said once.
            with contextlib.redirect_stdout(io.StringIO() if alone else sys.stdout):
                setup = build.prepare(asked, devices, data.preview, levers=levers)
            alone = alone or one_device_step(card, setup)
            found.append(predict(setup, card, gpus_per_host, alone))
        except UserError as error:
            refused[f"{name} {scheme}"] = str(error)
    if not found:
        reason, *others = dict.fromkeys(refused.values())
        more = f" ({len(others)} schemes or meshes have other reasons)" if others else ""
        raise UserError(f"--plan: nothing works on {len(devices)} devices: {reason}{more}")
    found.sort(key=lambda each: (not each.fits, each.terms.step))
    if not found[0].fits:
        raise _nothing_fits(found, card)
    images = f"{found[0].batch_size} images of {setup.shown_data}"
    title = [
        *_title(card, len(devices), gpus_per_host, images, setup.config.dtype),
        _origin(alone.is_estimated),
    ]
    return Plan("\n".join(map(_wrapped, title)), found, refused)


def stand_in(data: ml_collections.ConfigDict) -> Dataset | None:
    """Return black images in the place of a data set whose sizes are known; None for others.

    data: the config's section. A plan or a dry run for other machines needs no more.
    """
    if data.name not in SIZES:
        return None
    train, test, side, classes = SIZES[data.name]
    arrays = blank_arrays(dict(train=train, test=test), side or data.image_size or IMAGE_SIZE)
    return Dataset(name=data.name, **arrays, class_names=tuple(map(str, range(classes))))


def _nothing_fits(found: Sequence[Prediction], card: Card) -> UserError:
    """Return the error where each mesh and scheme needs more memory than the card has."""
    least = min(found, key=lambda each: each.memory)
    return UserError(
        f"--plan: nothing fits in the {card.memory / 1e9:.0f} GB of {card.device_kind}: the "
        f"least is {least.memory / 1e9:.1f} GB per device ({least.mesh} {least.parallelism}), "
        "expected more devices, or a smaller batch_size or model.width"
    )


# How a row of the planner's own splits the kernel of a dense layer: rows and columns, by letter.
SPLITS = {
    "w": {},  # whole
    "c": {"out": "model"},
    "r": {"in": "model"},
    "d": {"in": "data", "out": "model"},
    "m": {"in": "model", "out": "data"},
}
DENSE_LAYERS = ("fc1", "fc2", "fc3")


def rows_of_dense_layers() -> dict[str, dict]:
    """Return rows with every choice of SPLITS per dense layer, for config.placement.

    The convolutions are data parallel. The batch of the dense layers is split over the mesh axes
    that split no dense layer. PaSE (Elango, IPDPS 2021) searches such rows; those of the dense
    layers of dense_2d and hybrid are among them. A row's name has a letter per layer.
    """
    rows = {}
    for letters in itertools.product(SPLITS, repeat=len(DENSE_LAYERS)):
        splits = {
            f"{layer}_{side}": axis
            for layer, letter in zip(DENSE_LAYERS, letters, strict=True)
            for side, axis in SPLITS[letter].items()
        }
        left = [axis for axis in ALL if axis not in splits.values()] or None
        # dense_2d's order where fc1's rows lie on `data`: the exchange of its input then works.
        conv_batch = ["model", "data"] if splits.get("fc1_in") == "data" else "ALL"
        batches = dict(conv_batch=conv_batch, dense_batch=left, output_batch=left)
        rows[f"dense_{''.join(letters)}"] = batches | splits
    return rows


# ---- Text


def _title(card: Card, devices: int, gpus_per_host: int, images: str, dtype: str) -> Iterator[str]:
    """Yield the title of a plan's table: for what it was made, and what its columns mean."""
    hosts = -(-devices // gpus_per_host)
    machine = f"{hosts} x {devices // hosts} {card.device_kind}"
    yield f"Predicted steps of {images} on {machine}, {dtype}, the fastest first"
    yield "sent, held: per device; held is without the data set's images"
    if hosts > 1:
        yield f"Times across hosts: {card.sources.get('cluster', 'no source')}"


def _origin(is_estimated: bool) -> str:
    """Say where the computing of a plan's steps comes from."""
    if not is_estimated:
        return "Computing: from measured steps of this network on one device"
    return (
        "Computing: ESTIMATED from the card's rates, as it has no measured step of this network; "
        f"{cost.ESTIMATES_WITHIN}"
    )


def as_text(plan: Plan) -> Iterator[str]:
    """Yield a table, the winner and why, and what was left out.

    A scheme that costs the same on several meshes has one row.
    """
    rows: dict[tuple, list[str]] = {}
    for found in plan.predictions:
        cells = (
            found.parallelism,
            f"{1e3 * found.terms.step:.3f}",
            f"{found.batch_size / found.terms.step:,.0f}",
            f"{found.speedup:.2f}",
            f"{1e3 * found.terms.exposed:.3f}",
            f"{found.ring_bytes / 1e6:.1f}",
            f"{found.memory / 1e9:.2f}" if found.fits else f"{found.memory / 1e9:.2f}: too much",
        )
        rows.setdefault(cells, []).append(found.mesh)
    yield from program.aligned(
        plan.title,
        ("mesh", "scheme", "ms", "images/s", "speedup", "exposed, ms", "sent, MB", "held, GB"),
        [(_several(names), *cells) for cells, names in list(rows.items())[:MOST_ROWS]],
        numbers=6,
    )
    if len(rows) > MOST_ROWS:
        more = len(rows) - MOST_ROWS
        yield f"  and {more} slower rows; --config.parallelism=NAME shows those of one scheme"
    best = plan.predictions[0]
    yield _wrapped(why(plan.predictions))
    if row := rows_of_dense_layers().get(best.parallelism):
        yield "To take it, give:"
        yield f"  --mesh={best.mesh} --config.parallelism={best.parallelism} \\"
        yield f'  --config.placement="{ {best.parallelism: row} }"'
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.refused.items():
        scheme = name.partition(" ")[2]
        reasons.setdefault(reason.removeprefix(f"parallelism={scheme}: "), []).append(name)
    for reason, names in reasons.items():
        yield _wrapped(f"Left out: {_several(names)}: {reason}")


def _wrapped(text: str) -> str:
    """Return a sentence in lines of at most COLUMNS."""
    return textwrap.fill(text, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


def _several(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def why(predictions: Sequence[Prediction]) -> str:
    """Say what makes the first prediction faster than `data`, and which scheme comes next."""
    best = predictions[0]
    text = f"Fastest: {best.mesh} {best.parallelism}, {1e3 * best.terms.step:.3f} ms"
    data = next((found for found in predictions if found.parallelism == "data"), best)
    if data is not best:
        saved = {
            "communication": data.terms.exposed - best.terms.exposed,
            "the update": data.terms.update - best.terms.update,
        }
        parts = [f"{1e3 * time:.3f} ms of {name}" for name, time in saved.items() if time > 0]
        text += (
            f", {data.terms.step / best.terms.step:.2f} times as fast as {data.mesh} data: it "
            f"saves {' and '.join(parts)}"
        )
    following = [
        found
        for found in predictions
        if found.parallelism != best.parallelism and found.terms.step > 1.0005 * best.terms.step
    ]
    if following:
        slower = following[0].terms.step / best.terms.step - 1
        text += f". Next: {following[0].mesh} {following[0].parallelism}, {slower:.1%} slower"
    estimated = " Computing is estimated." if best.alone.is_estimated else ""
    return (
        f"{text}.{estimated} Differences below the errors of a prediction say nothing: "
        "results/predictions.md."
    )
