"""Measure a machine and write its calibration for the planner: a card, one JSON file.

  python -m cnn_spmd.calibrate mine.json
  python -m cnn_spmd.calibrate mine.json --config experiments/alexnet_2012_imagenet.py
  python -m cnn_spmd.calibrate mine.json --config.model.width=2048 --batches 64,256

It measures a large copy, a large product, convolutions of several widths, tiny kernels, each kind
of collective over all local devices where there are several, and the training step of each config
on one device, on random images. What it cannot measure comes from the card that ships for such
devices. `sources` in the file says where each field comes from.

Exit codes: 0 done; 2 bad input; 130 interrupted.
"""

import argparse
import datetime
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

import jax
import ml_collections
from absl import flags

from cnn_spmd import config as configs
from cnn_spmd import experiment
from cnn_spmd.analysis import card_file, cost, rates
from cnn_spmd.errors import UserError
from cnn_spmd.training import environment, one_device, runfiles, unused
from cnn_spmd.training.provenance import provenance
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.terminal import say

# The network that is timed without --config. CIFAR-10 need not be at hand.
DEFAULT = (
    "--config",
    str(experiment.EXPERIMENTS / "alexnet_cifar.py"),
    "--config.data.name=synthetic",
)
# Batches of the step, by platform: with these it all takes less than two minutes.
BATCHES = "32,128,512"
CPU_BATCHES = "8,32,128"

# ---- Measure


def measure(
    devices: Sequence[jax.Device], sizes: rates.Sizes, networks: Sequence[Sequence[Setup]]
) -> dict[str, object]:
    """Measure the devices, which are of one kind, and return their card's fields.

    networks: the Setups of each network on one device, by batch size.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fields, sources = not_measured(devices)
    here = f"measured on {len(devices)} x {devices[0].device_kind}"
    found = computing(sizes)
    fields |= found
    sources |= dict.fromkeys(found, here)
    if len(devices) > 1:
        links, kept = host_links(devices, sizes, fields["spans"].pop("host", {}))
        sources["host"] = "not measured: an all-reduce or an all-gather had no positive time"
        if links.keys() >= set(card_file.ALWAYS):
            fields["spans"]["host"] = links
            sources["host"] = here + (f"; {', '.join(kept)}: as before" if kept else "")
    steps = list(map(one_device.measure, networks))
    # The measured steps of one network differ in nothing but their points (batch, seconds).
    networks_now = [step | dict(points=()) for step in steps]
    others = [other for other in fields["steps"] if other | dict(points=()) not in networks_now]
    fields["steps"] = [*steps, *others]
    sources["steps"] = here + (f"; other networks: {sources['steps']}" if others else "")
    return fields | dict(
        sources=sources, measured=provenance() | dict(devices=len(devices), started=started)
    )


HOST_MEMORY = "a device's share of the host's memory"


def not_measured(devices: Sequence[jax.Device]) -> tuple[dict, dict[str, str]]:
    """Return what is known of such devices before anything is measured, and its sources.

    It comes from the card that ships for them. Otherwise memory is what JAX says, collectives do
    not delay a step and are not hidden, and there is no time of a collective.
    """
    kind = devices[0].device_kind
    if shipped := cost.of_device(kind):
        fields = dict(
            device_kind=kind,
            memory=shipped.memory,
            gap=shipped.gap,
            hidden_share=shipped.hidden_share,
            hidden_gathers=shipped.hidden_gathers,
            spans={span: links.collectives for span, links in shipped.spans.items()},
            steps=list(shipped.steps),
        )
        texts = shipped.sources.items()
        return fields, {name: f"card {shipped.name}: {text}" for name, text in texts}
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    fields = dict(
        device_kind=kind,
        memory=limit / configs.JAX_SHARE if limit else configs.machine_memory() // len(devices),
        gap=0,
        hidden_share=0,
        spans={},
        steps=[],
    )
    sources = dict(
        memory=f"what JAX may use of it / {configs.JAX_SHARE}" if limit else HOST_MEMORY,
        gap="not measured, taken as 0",
        hidden_share="not measured, taken as 0",
        host="not measured: there is one device",
        cluster="not measured",
    )
    return fields, sources


def computing(sizes: rates.Sizes) -> dict[str, object]:
    """Return the rates of one device, by their fields in a card."""
    copy_rate = round(rates.copy_rate(sizes))
    say(f"copy_rate: {copy_rate / 1e9:,.1f} GB/s")
    matrix_rate = round(rates.matrix_rate(sizes))
    say(f"matrix_rate: {matrix_rate / 1e12:,.3f} TFLOP/s")
    kernel_seconds = float(f"{rates.kernel_seconds(sizes):.4g}")
    say(f"kernel_seconds: {1e6 * kernel_seconds:.2f} us")
    points = []
    for width, rate in rates.product_rates(sizes, kernel_seconds):
        points.append([width, round(rate)])
        say(f"product_rates: {rate / 1e12:,.3f} TFLOP/s at a width of {width}")
    return dict(
        copy_rate=copy_rate,
        matrix_rate=matrix_rate,
        kernel_seconds=kernel_seconds,
        product_rates=points,
    )


def host_links(
    devices: Sequence[jax.Device], sizes: rates.Sizes, older: Mapping[str, list]
) -> tuple[dict[str, list], list[str]]:
    """Return the points (ring bytes, seconds) of each kind of collective over all devices.

    older: those of the shipped card. They stay for an operation of which a time is not positive;
    their names are returned too. Without older ones, the other points are all there are.
    """
    links, kept = {}, []
    for operation, points in rates.collectives(devices, sizes):
        bad = [size for size, seconds in points if seconds <= 0]
        if bad:
            sizes_text = ", ".join(f"{size:,}" for size in bad)
            then = "the older times stay" if operation in older else "left out"
            say(f"warning: {operation}: no positive time for {sizes_text} ring bytes: {then}")
            if operation in older:
                links[operation] = older[operation]
                kept.append(operation)
                continue
            points = [point for point in points if point[1] > 0]
            if len(points) < 2:
                continue
        links[operation] = [[size, float(f"{seconds:.4g}")] for size, seconds in points]
        (low, short), (high, long) = points[0], points[-1]
        say(
            f"{operation}: {1e3 * short:.3f} ms for {low / 1e6:.2f} MB in a ring, "
            f"{1e3 * long:.3f} ms for {high / 1e6:.2f} MB"
        )
    return links, kept


# ---- The program


def parse_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Return the config that --config and --config.FIELD=VALUE give.

    Raises UserError for other arguments, and as launch.py does.
    """
    values, argv = flags.FlagValues(), ["", *arguments]
    experiment.define_flag(values, argv)
    for argument in experiment.parse_flags(values, argv)[1:]:
        raise UserError(f"unexpected argument {argument!r}: flags start with --, see --help")
    configs.validate(values.config)
    unused.refuse(values.config, experiment.given_fields(values))
    return values.config


def parser() -> environment.Parser:
    """Return the parser of the command line, which leaves --config.FIELD=VALUE alone."""
    made = environment.Parser("calibrate", __doc__, allow_abbrev=False)
    made.add_argument("out", metavar="OUT.json", type=pathlib.Path, help="replaced if it is a card")
    made.add_argument(
        "--config",
        metavar="E",
        action="append",
        help="the experiment whose step is timed; may be given several times; --config.FIELD=VALUE "
        "sets a field of all of them (default: experiments/alexnet_cifar.py, without its data set)",
    )
    made.add_argument(
        "--batches", help=f"images per step (default: {BATCHES}, on a CPU {CPU_BATCHES})"
    )
    made.add_argument("--cpu_devices", type=int, help="simulate this many devices on the CPU")
    return made


def refuse(arguments: argparse.Namespace) -> None:
    """Raise UserError for arguments that cannot work, before jax starts."""
    out, devices = arguments.out, arguments.cpu_devices
    if out.suffix != ".json":
        raise UserError(f"{out}: expected the name of a file that ends in .json")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: expected a folder that is there and can be written")
    if out.exists():
        try:
            card_file.read(out)
        except UserError as error:
            raise UserError(f"{error}; give another name, as it is not overwritten") from error
    batches = arguments.batches
    if batches is not None and not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", batches):
        raise UserError(f"--batches={batches}: expected positive numbers joined by commas")
    if devices is not None and not 1 <= devices <= configs.MOST_CPU_DEVICES:
        most = configs.MOST_CPU_DEVICES
        raise UserError(f"--cpu_devices={devices}: expected from 1 to {most}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every known error is one line."""
    return environment.exit_code_of(lambda: calibrate(argv))


def calibrate(argv: Sequence[str] | None) -> None:
    """Do what the command line says."""
    arguments, rest = parser().parse_known_args(argv)
    refuse(arguments)
    chosen = [("--config", name) for name in arguments.config or ()] or [DEFAULT]
    experiments = [parse_config([*each, *rest]) for each in chosen]
    environment.prepare()
    if arguments.cpu_devices:
        environment.simulate(arguments.cpu_devices)
    environment.device_count()
    devices = jax.local_devices()
    platform = devices[0].platform
    say(f"Measuring {len(devices)} x {devices[0].device_kind}")
    texts = arguments.batches or (CPU_BATCHES if platform == "cpu" else BATCHES)
    batches = sorted({int(text) for text in texts.split(",")})
    networks = [one_device.setups(each, batches, devices[0]) for each in experiments]
    sizes = rates.sizes_for(platform)
    runfiles.write_json(arguments.out, measure(devices, sizes, networks))
    print(arguments.out)


if __name__ == "__main__":
    environment.protect_streams()
    sys.exit(main())
