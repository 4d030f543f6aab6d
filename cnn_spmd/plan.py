"""Predict what a step costs on each mesh and under each scheme, and choose.

Nothing is compiled: bytes come from the closed form (analysis/communication.py), times from the
card's calibration (analysis/cost.py). The devices only stand for places in a mesh, so that a laptop
plans for any number of GPUs.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections

from cnn_spmd.analysis import cost, program
from cnn_spmd.analysis.cost import Card
from cnn_spmd.config import AUTO, IMAGE_SIZE, image_bytes_per_device
from cnn_spmd.data.dataset import Dataset, Found, blank_arrays
from cnn_spmd.errors import UnevenBatch, UserError
from cnn_spmd.sharding import mesh as meshes
from cnn_spmd.sharding.placement import multiples_near
from cnn_spmd.sharding.table import ALL, TABLE
from cnn_spmd.training import build
from cnn_spmd.training.prediction import Prediction, one_device_step, predict, repeats_work
from cnn_spmd.training.setup import Setup

MOST_ROWS = 30  # of a plan's printed table
# Where devices exchange images, a plan looks through this many steps for the most images that one
# device sends to another. All steps of a run on ImageNet would take a second for each row.
SAMPLED_STEPS = 100
COLUMNS = 100  # of a plan's sentences
# What hosts streamed, in words and at best in bytes/s: results/data/streaming.
STREAMED = "Hosts streamed 23 to 30 GB/s to two H200s and 26 to 28 GB/s to four", 30e9
# Data set -> training images, test images, pixels per side, classes. Sources: Krizhevsky 2009;
# Russakovsky et al. 2015 (their sides differ, and the config's data.image_size scales them).
SIZES = {"cifar10": (50_000, 10_000, 32, 10), "imagenet2012": (1_281_167, 50_000, 0, 1000)}


class Plan(NamedTuple):
    """What the planner found.

    title: for whom. predictions: the fastest first, and those that do not fit in memory last.
    refused: "MESH SCHEME" -> why it has no prediction. is_limited: whether some are refused because
    the global batch does not divide.
    """

    title: str
    predictions: list[Prediction]
    refused: dict[str, str]
    is_limited: bool = False


def plan(
    config: ml_collections.ConfigDict,
    data: Found,
    card: Card | None,
    gpus_per_host: int,
    mesh: str = AUTO,
) -> Plan:
    """Predict a step on each mesh over all of JAX's devices, under each scheme.

    config: its batch_size is the global batch. Its parallelism is the only scheme to look at, or
    "auto" for all. card: None where the devices have none. mesh: the meshes to look at, joined by
    commas, or "auto" for all.
    Raises UserError where nothing has a prediction, or nothing fits in memory.
    """
    devices = jax.devices()
    if card is None:
        raise UserError(
            f"--card: {devices[0].device_kind} has no calibration: make one with "
            "python -m cnn_spmd.calibrate, and give its file as --card, or give one of "
            f"{', '.join(cost.names())}"
        )
    names = meshes.shapes_over(len(devices)) if mesh == AUTO else mesh.split(",")
    schemes = [config.parallelism]
    if config.parallelism == AUTO:
        schemes = list(dict.fromkeys([*TABLE, *config.placement]))
    uneven = _uneven(config, data.preview, math.prod(meshes.parse(names[0]).values()))
    found, refused, alone = [], {}, None
    for name, scheme in itertools.product(names, schemes):
        asked = config.copy_and_resolve_references()
        asked.parallelism = scheme
        asked.mesh.update(meshes.parse(name))
        if alone:  # statistics of the images take time, and change nothing from here on
            asked.data.update(normalise="channel", colour_noise=0.0)
        try:
            # Only an estimated step needs the fast forms. JAX traces the plain ones faster.
            more = dict(fast_forms=() if alone else None, memory=card.usable_memory)
            # What has no effect is the same everywhere, and is said once.
            with contextlib.redirect_stdout(io.StringIO() if alone else sys.stdout):
                setup = build.prepare(asked, devices, data.preview, **more)
            setup.config.steps = min(setup.config.steps, SAMPLED_STEPS)
            alone = alone or one_device_step(card, setup)
            row = predict(setup, card, gpus_per_host, alone)
            if scheme in rows_of_dense_layers() and repeats_work(setup):
                raise UserError("several devices compute the same part of a dense layer")
            found.append(row)
        except UserError as error:
            of_batch = uneven if isinstance(error, UnevenBatch) else ""
            refused[f"{name} {scheme}"] = of_batch or str(error)
    if not found:
        raise _nothing_works(refused, len(devices))
    found.sort(key=lambda each: (not each.fits, each.terms.step))
    if not found[0].fits:
        raise _nothing_fits(found, card, setup)
    is_limited = uneven in refused.values()
    title = [
        *[uneven] * is_limited,
        *_title(setup, card, len(devices), gpus_per_host, found[0]),
        f"Computing: {alone.origin}",
    ]
    return Plan("\n".join(map(_wrapped, title)), found, refused, is_limited)


def stand_in(data: ml_collections.ConfigDict) -> Dataset | None:
    """Return black images in the place of a data set whose sizes are known; None for others.

    data: the config's section. A plan or a dry run for other machines needs no more.
    """
    if data.name not in SIZES:
        return None
    train, test, side, classes = SIZES[data.name]
    arrays = blank_arrays(dict(train=train, test=test), side or data.image_size or IMAGE_SIZE)
    return Dataset(name=data.name, **arrays, class_names=tuple(map(str, range(classes))))


def _uneven(config: ml_collections.ConfigDict, data: Dataset, devices: int) -> str:
    """Say that the global batch does not divide by the devices, and which do; "" where it does."""
    batch = (config.data.fallback_batch_size if data.fallback else 0) or config.batch_size
    if batch % devices == 0:
        return ""
    works = multiples_near(batch, devices)
    return f"batch_size={batch}: does not divide by {devices} devices; {works} would"


def _nothing_works(refused: Mapping[str, str], devices: int) -> UserError:
    """Return the error where each mesh and scheme is refused; refused: name -> the reason."""
    reason, *others = dict.fromkeys(refused.values())
    more = f" (other reasons: {len(others)})" if others else ""
    return UserError(f"--plan: nothing works on {devices} devices: {reason}{more}")


def _nothing_fits(found: Sequence[Prediction], card: Card, setup: Setup) -> UserError:
    """Return the error where each mesh and scheme needs more memory than the card has.

    setup: any of those that were predicted: the data set's images take as much under each.
    """
    least = min(found, key=lambda each: each.memory)
    memory, where = f"{least.memory / 1e9:.1f} GB", f"({least.mesh} {least.parallelism})"
    resident, images = setup.config.data.resident, setup.image_bytes_per_device
    held = f"{images / 1e9:.1f} GB of images"
    if least.memory <= card.usable_memory:  # so without the images it would fit
        needed = f"data.resident={resident} puts {held} on each device, beside {memory} or more"
        needed += f" for a step {where}"
        expected = f"data.resident={'auto or no' if resident == 'yes' else 'no'}"
    else:
        needed = f"the least is {memory} per device {where}" + (f" beside {held}" if images else "")
        expected = "more devices, or a smaller batch_size or model.width"
    return UserError(
        f"--plan: nothing fits in the {card.usable_memory / 1e9:.1f} GB of {card.device_kind} that "
        f"JAX takes by default: {needed}, expected {expected}"
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


@functools.cache
def rows_of_dense_layers() -> dict[str, dict]:
    """Return rows with every choice of SPLITS per dense layer, for config.placement.

    The convolutions are data parallel. The batch of the dense layers is split over the mesh axes
    that split no dense layer. On some meshes devices then repeat each other's work; `plan` leaves
    these out. PaSE (Elango, IPDPS 2021) searches such rows; those of the dense
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


def _title(
    setup: Setup, card: Card, devices: int, gpus_per_host: int, best: Prediction
) -> Iterator[str]:
    """Yield the title of a plan's table: for what it was made, and what its columns mean.

    best: the fastest prediction.
    """
    hosts = -(-devices // gpus_per_host)
    network = f"{setup.config.model.name} at {setup.image_size}x{setup.image_size}"
    images = f"{setup.config.batch_size} images of {setup.shown_data}"
    machine = f"{hosts} x {devices // hosts} {card.device_kind}"
    yield (
        f"Predicted steps of {network} with {images} on {machine}, {setup.config.dtype}, the "
        "fastest first"
    )
    where = program.WHERE_IMAGES_LIVE[setup.config.data.resident]
    held = setup.image_bytes_per_device
    yield f"Images: {where}" + (f", {held / 1e9:.2f} GB per device" if held else "")
    if setup.config.data.resident == "no":
        sent = best.batch_size * setup.data.train_images[0].nbytes / hosts
        yield (
            f"The fastest step needs {sent / best.terms.step / 1e9:.2f} GB/s of images from each "
            f"host. {STREAMED[0]}: at {STREAMED[1] / 1e9:.0f} GB/s, no step is shorter than "
            f"{1e3 * sent / STREAMED[1]:.3f} ms"
        )
        shard = image_bytes_per_device("sharded", setup.data, devices)
        yield f"With data.resident=sharded each device holds {shard / 1e9:.2f} GB of images"
    yield "sent, held: per device; held is without the data set's images, which must fit, too"
    spans = {"host": "in a host"} | ({"cluster": "across hosts"} if hosts > 1 else {})
    for span, where in spans.items():
        yield f"Card {card.name}, collectives {where}: {card.sources.get(span, 'no source')}"


def as_text(plan: Plan) -> Iterator[str]:
    """Yield a table, the winner and why, how to take it, and what was left out.

    A scheme that costs the same on several meshes has one row. Schemes with equal predictions on a
    mesh share a row too: on 8x1, `hybrid` places every array as `data` does.
    """
    rows: dict[tuple, list[str]] = {}
    first: dict[Prediction, str] = {}
    repeated: dict[str, list[str]] = {}
    for found in plan.predictions:
        nameless = dataclasses.replace(found, parallelism="")
        scheme = first.setdefault(nameless, found.parallelism)
        if scheme != found.parallelism:
            repeated.setdefault(f"{found.mesh} {scheme}", []).append(found.parallelism)
            continue
        cells = (
            scheme,
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
    if repeated:
        yield _wrapped(_repetitions(repeated))
    yield _wrapped(why(plan))
    schemes = {found.parallelism for found in plan.predictions}
    if len(schemes) > 1 and schemes.isdisjoint(rows_of_dense_layers()):
        yield "--plan_rows also tries other splits of the dense layers"
    yield from _flags(plan.predictions[0])
    yield from _left_out(plan.refused)


def _repetitions(repeated: Mapping[str, Sequence[str]]) -> str:
    """Say which schemes share the row of another one; the planner's own rows are only counted.

    repeated: "MESH SCHEME" of a row -> the other schemes that it stands for.
    """
    own, texts, count = rows_of_dense_layers(), [], 0
    for row, schemes in repeated.items():
        named = [scheme for scheme in schemes if scheme not in own]
        texts += [f"{row}, the same program as {', '.join(named)}"] * bool(named)
        count += len(schemes) - len(named)
    texts += [f"{count} equal rows of --plan_rows"] * bool(count)
    return f"Shown once: {'; '.join(texts)}"


def _flags(best: Prediction) -> Iterator[str]:
    """Yield the flags that train with a prediction's mesh and scheme."""
    yield "To train with it, give:"
    flags = f"  --mesh={best.mesh} --config.parallelism={best.parallelism}"
    row = rows_of_dense_layers().get(best.parallelism)
    yield flags + " \\" * bool(row)
    if row:
        yield f'  --config.placement="{ {best.parallelism: row} }"'


def _left_out(refused: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each reason, without the mesh and the scheme that it names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        mesh, scheme = name.split(" ", 1)
        reason = reason.removeprefix(f"parallelism={scheme}: ")
        reason = reason.replace(f" (mesh {mesh}, parallelism={scheme})", "")
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield _wrapped(f"Left out: {_several(names)}: {reason}")


def _wrapped(text: str) -> str:
    """Return a sentence in lines of at most COLUMNS."""
    return textwrap.fill(text, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


def _several(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def why(plan: Plan) -> str:
    """Say what makes the first prediction faster than `data`, and which scheme comes next.

    Where the batch leaves few meshes and schemes, say among how many it is the fastest.
    """
    predictions = [each for each in plan.predictions if each.fits]
    best, count = predictions[0], len(plan.predictions)
    first = "Fastest"
    if plan.is_limited:
        first = f"Fastest of the {count} choices" if count > 1 else "The only choice"
        first += f" that batch_size={best.batch_size} leaves"
    text = f"{first}: {best.mesh} {best.parallelism}, {1e3 * best.terms.step:.3f} ms"
    data = next((found for found in predictions if found.parallelism == "data"), best)
    if data is not best:
        saved = {
            "communication": data.terms.exposed - best.terms.exposed,
            "the update": data.terms.update - best.terms.update,
        }
        parts = [f"{1e3 * time:.3f} ms of {name}" for name, time in saved.items() if time > 0]
        text += f", {data.terms.step / best.terms.step:.2f} times as fast as {data.mesh} data"
        text += f": it saves {' and '.join(parts)}" if parts else ""
    following = [
        found
        for found in predictions
        if found.parallelism != best.parallelism and found.terms.step > best.terms.step
    ]
    if following:
        slower = following[0].terms.step / best.terms.step - 1
        text += (
            f". Next scheme: {following[0].mesh} {following[0].parallelism}, {slower:.1%} slower"
        )
    estimated = " Computing is estimated." if best.alone.is_estimated else ""
    return (
        f"{text}.{estimated} {cost.ERRORS}. Schemes within a few percent of each other may change "
        "places: results/predictions.md."
    )
