"""Time training on images that lie on the devices, and on images streamed from the host, in turn.

  python benchmarks/streaming.py
  python benchmarks/streaming.py --mesh 4x1 --parallelism dense_2d    also images split over devices
  python benchmarks/streaming.py --batches 8 --image_size 40 --crop 32 --examples 64 --seconds 0.1
                                 tries this script on a CPU

AlexNet with the recipe of experiments/alexnet_cifar.py, on synthetic images of 256x256 and 1000
classes, cropped to 224x224; in bfloat16 on GPUs. The sides are data.resident=yes, sharded (on
several devices) and no. They share the images and run their chunks as a run does. Each side chooses
the steps of a chunk by itself.

For the streamed side the script also says what the host can do, in bytes per second: gather images
into a chunk's buffer, copy such a buffer to the devices, and both at once.

A measurement spans whole chunks, for at least --seconds seconds, from the end of one chunk to the
end of another. The sides are measured in turn, --repeats times. The script prints one JSON
object with all repeats and their medians.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import ml_collections
import numpy as np
from ours import Trainer, synthetic_config
from speed import card

from cnn_spmd.data import registry, streaming
from cnn_spmd.data.dataset import Dataset
from cnn_spmd.sharding import mesh
from cnn_spmd.training import build
from cnn_spmd.training.provenance import provenance
from cnn_spmd.training.timetable import Chunk

# Chunks before each measurement. Afterwards the streamed side is no further ahead than in a run.
WARMUP = 3
SIDES = dict(resident="yes", sharded="sharded", streamed="no")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batches", default="512,128", help="per device (default: %(default)s)")
    add("--mesh", default="1x1", help="DATAxMODEL (default: %(default)s)")
    add("--parallelism", default="hybrid", help="a scheme (default: %(default)s)")
    add("--image_size", type=int, default=256, help="side of the images (default: 256)")
    add("--crop", type=int, default=224, help="side of what the network sees (default: 224)")
    add("--examples", type=int, default=20_000, help="training images (default: 20000)")
    add("--seconds", type=float, default=3.0, help="per measurement (default: 3)")
    add("--repeats", type=int, default=3, help="measurements of each side (default: 3)")
    return parser.parse_args()


def make_config(args: argparse.Namespace) -> ml_collections.ConfigDict:
    """Return the config that all sides and batches share."""
    config = synthetic_config(args.image_size, args.examples)
    config.mesh.update(mesh.parse(args.mesh))
    config.parallelism = args.parallelism
    config.data.update(dict(crop=args.crop, crop_pad=0))
    # The learning-rate schedule spans more steps than are measured.
    config.steps = 10**6
    return config


class Side(Trainer):
    """A training that goes on from measurement to measurement, with one kind of feed."""

    def __init__(self, config: ml_collections.ConfigDict, data: Dataset, resident: str):
        config = config.copy_and_resolve_references()
        config.data.resident = resident
        super().__init__(build.prepare(config, data=data))
        n = self.steps_per_call
        chunks = (Chunk(at, at + n) for at in itertools.count(0, n))
        self.inputs = self.setup.inputs(chunks)
        self.rates: list[int] = []

    def measure(self, seconds: float) -> None:
        """Train for WARMUP chunks and then for `seconds` or more; note the images per second."""
        ends: list[float] = []  # of chunks
        values = None
        while len(ends) <= WARMUP or ends[-1] - ends[WARMUP] < seconds:
            before = values
            _, inputs = next(self.inputs)
            self.state, values = self.program(self.state, *inputs)
            if before is not None:
                # The host is at most one chunk ahead of the devices, as in training/loop.py.
                jax.block_until_ready(before)
                ends.append(time.perf_counter())
        jax.block_until_ready((self.state, values))
        self.check_loss(values)
        images = (len(ends) - 1 - WARMUP) * self.steps_per_call * self.setup.config.batch_size
        self.rates.append(round(images / (ends[-1] - ends[WARMUP])))


def sides_on(devices: int) -> dict[str, str]:
    """Return data.resident by the name of a side. One device has nobody to share images with."""
    return {name: resident for name, resident in SIDES.items() if name != "sharded" or devices > 1}


def host_rates(side: Side, calls: int = 5) -> dict[str, int]:
    """Return bytes of images per second: gathered, copied, and each beside the other.

    side: the streamed one. calls: of each, after one that does not count.
    """
    feed, config = side.setup.feeds[0], side.setup.config
    shape = (side.steps_per_call, config.batch_size)
    indices = np.random.default_rng(0).integers(len(feed.images), size=shape, dtype=np.int32)
    sharding = feed.shapes(*shape)[0].images.sharding
    filled, other = streaming.Buffer(), streaming.Buffer()

    def gather(buffer: streaming.Buffer = filled) -> None:
        buffer.fill(feed.images, indices, sharding)

    def copy() -> None:
        jax.block_until_ready(filled.put(sharding))

    def rate(call: Callable[[], None], ends: Callable[[int], bool]) -> int:
        call()
        begin, done = time.perf_counter(), 0
        while not done or not ends(done):
            call()
            done += 1
        size = math.prod(shape) * math.prod(feed.images.shape[1:])
        return round(done * size / (time.perf_counter() - begin))

    def often(done: int) -> bool:
        return done >= calls

    found = dict(
        gather_bytes_per_second=rate(gather, often), copy_bytes_per_second=rate(copy, often)
    )
    gathered = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        copying = thread.submit(rate, copy, lambda _: gathered.is_set())
        found["gather_beside_copies_bytes_per_second"] = rate(lambda: gather(other), often)
        gathered.set()
        found["copy_beside_gathers_bytes_per_second"] = copying.result()
    for buffer in (filled, other):
        buffer.release()
    return found


def compare(args: argparse.Namespace, config: ml_collections.ConfigDict, data: Dataset) -> dict:
    """Return the images per second of each side."""
    devices = math.prod(config.mesh.values())
    sides = {name: Side(config, data, kind) for name, kind in sides_on(devices).items()}
    for _ in range(args.repeats):
        for side in sides.values():
            side.measure(args.seconds)
    row = dict(
        mesh=args.mesh,
        parallelism=args.parallelism,
        batch_size=config.batch_size,
        image_size=args.image_size,
        crop=args.crop,
        examples=args.examples,
        dtype=sides["streamed"].setup.config.dtype,
        page_locked=sides["streamed"].setup.feeds[0].page_locked,
    )
    for name, side in sides.items():
        row[f"{name}_images_per_second"] = statistics.median(side.rates)
        row[f"{name}_repeats"] = side.rates
        row[f"{name}_steps_per_call"] = side.steps_per_call
        side.inputs.close()
    return row | host_rates(sides["streamed"])


def main() -> None:
    """Measure all batches and print one line of JSON."""
    args = parse_arguments()
    config = make_config(args)
    data = registry.load(config.data)
    result = dict(hardware=card(), **provenance(), streaming=[])
    devices = math.prod(config.mesh.values())
    for batch in map(int, args.batches.split(",")):
        config.batch_size = batch * devices
        result["streaming"].append(compare(args, config, data))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
