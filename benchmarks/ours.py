"""Time our training step as a run does it.

  python benchmarks/ours.py --batch 512 --mesh 1x1
  python benchmarks/ours.py --batch 512 --fast_forms pool_index,carry_bf16    with these alone

AlexNet with the recipe of experiments/alexnet_cifar.py, on synthetic images of 224x224 and 1000
classes that lie on the device. Each step trains on other examples, with random crops, mirroring,
dropout and smoothed labels; in bfloat16 on GPUs.

The host's clock measures --steps steps or more, 3 times, after at least 8 steps of warm-up. The
host waits for the devices before it reads the clock. The script prints one line of JSON.
"""

import argparse
import json
import math
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import ml_collections

from cnn_spmd.layers.common import FAST_FORMS
from cnn_spmd.sharding import mesh
from cnn_spmd.training import build
from cnn_spmd.training.timetable import split_into_chunks
from experiments.alexnet_cifar import get_config

WARMUP = 8
REPEATS = 3
CLASSES = 1000
EXAMPLES = 4096  # that lie on the device, unless a batch is larger


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, required=True, help="images per device")
    parser.add_argument("--mesh", default="1x1", help="DATAxMODEL")
    parser.add_argument(
        "--parallelism", default="hybrid", help="a row of cnn_spmd/sharding/table.py"
    )
    parser.add_argument(
        "--steps", type=int, default=400, help="at least this many are timed at once (default: 400)"
    )
    parser.add_argument(
        "--image_size", type=int, default=224, help="32, with --steps 8, tries this script on a CPU"
    )
    parser.add_argument(
        "--fast_forms",
        help="use only these fast forms, joined by commas; '' is none "
        f"(default: all: {','.join(FAST_FORMS)})",
    )
    args = parser.parse_args()
    if args.fast_forms is not None:
        args.fast_forms = [name for name in args.fast_forms.split(",") if name]
        for name in args.fast_forms:
            if name not in FAST_FORMS:
                parser.error(f"--fast_forms: {name}: expected some of {', '.join(FAST_FORMS)}")
    return args


def synthetic_config(image_size: int, examples: int) -> ml_collections.ConfigDict:
    """Return the recipe on random images of CLASSES classes, of which `examples` train."""
    config = get_config()
    config.data.name = "synthetic"
    config.data.synthetic.update(
        dict(image_size=image_size, classes=CLASSES, train_examples=examples, test_examples=1)
    )
    # As in peer.py. The recipe's own settings are for small images.
    config.optimizer.update(dict(learning_rate=0.01, clip_norm=0.0))
    return config


def prepare(args: argparse.Namespace) -> build.Setup:
    """Return what is timed."""
    sizes = mesh.parse(args.mesh)
    batch_size = args.batch * math.prod(sizes.values())
    config = synthetic_config(args.image_size, max(EXAMPLES, batch_size))
    config.update(
        dict(
            mesh=sizes,
            parallelism=args.parallelism,
            batch_size=batch_size,
            # The learning-rate schedule spans all steps.
            steps=WARMUP + (REPEATS + 1) * args.steps,
        )
    )
    fast_forms = {} if args.fast_forms is None else dict(fast_forms=args.fast_forms)
    return build.prepare(config, **fast_forms)


class Trainer:
    """Run the compiled train step, chunk by chunk, and time it."""

    def __init__(self, setup: build.Setup):
        self.setup = setup
        self.steps_per_call = setup.config.steps_per_call
        since = time.perf_counter()
        self.program = setup.train_program(self.steps_per_call)
        self.compile_seconds = time.perf_counter() - since
        setup.feeds[0].load()
        self.state = setup.init()
        self.step = 0
        self.loss = math.nan

    def milliseconds(self, at_least: int) -> float:
        """Train for `at_least` steps, in whole chunks; return milliseconds per step."""
        first, values = self.step, None
        jax.block_until_ready(self.state)
        since = time.perf_counter()
        n = self.steps_per_call
        stops = [first + -(-at_least // n) * n]
        for _, inputs in self.setup.inputs(split_into_chunks(first, stops, n)):
            before = values
            self.state, values = self.program(self.state, *inputs)
            # The host is at most one chunk ahead of the devices, as in training/loop.py.
            jax.block_until_ready(before)
            self.step += n
        jax.block_until_ready((self.state, values))
        seconds = time.perf_counter() - since
        self.check_loss(values)
        return round(1e3 * seconds / (self.step - first), 4)

    def check_loss(self, values: dict) -> None:
        """Keep the last loss of a chunk. Raises ArithmeticError unless it is finite."""
        self.loss = float(values["loss"][-1])
        if not math.isfinite(self.loss):
            raise ArithmeticError(f"loss is {self.loss}")


def main() -> None:
    """Time the step and print one line of JSON."""
    args = parse_arguments()
    setup = prepare(args)
    trainer = Trainer(setup)
    trainer.milliseconds(WARMUP)
    times = [trainer.milliseconds(args.steps) for _ in range(REPEATS)]
    params = setup.functions.abstract_state.params
    result = dict(
        mesh=args.mesh,
        parallelism=args.parallelism,
        gpus=setup.place.mesh.size,
        batch_per_gpu=args.batch,
        image_size=args.image_size,
        dtype=setup.config.dtype,
        param_count=sum(param.size for param in jax.tree.leaves(params)),
        steps_per_call=trainer.steps_per_call,
        steps=args.steps,
        step_milliseconds=times,
        loss=round(trainer.loss, 4),
        compile_seconds=round(trainer.compile_seconds, 2),
    )
    if args.fast_forms is not None:
        result["fast_forms"] = args.fast_forms
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
