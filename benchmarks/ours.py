"""Times our training step as a run takes it: python benchmarks/ours.py --batch 512 --mesh 1x1

The config of experiments/alexnet_cifar.py on synthetic images of 224x224 and 1000 classes: random crops and mirroring from
the data set on the device, dropout, smoothed labels, loss and optimizer, each step on other examples; bfloat16 on GPUs.
Milliseconds a step by the host's clock around --steps or more, 3 times, after at least 8 steps of warm-up; the host waits
for the devices at the end of each time. Prints one line of JSON.
"""

import argparse
import json
import math
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
WARMUP, REPEATS = 8, 3
CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, required=True, help="images a device")
    parser.add_argument("--mesh", default="1x1", help="DATAxMODEL")
    parser.add_argument(
        "--parallelism", default="hybrid", help="a row of cnn_spmd/sharding/table.py"
    )
    parser.add_argument(
        "--steps_per_call", type=int, default=0, help="0: as the config resolves it"
    )
    parser.add_argument("--steps", type=int, default=400, help="a timing, at least (default: 400)")
    parser.add_argument(
        "--image_size", type=int, default=224, help="32, with --steps 8, tries this script on a CPU"
    )
    args = parser.parse_args()

    sys.path.insert(0, str(ROOT))
    import jax

    from cnn_spmd.data import order
    from cnn_spmd.sharding import mesh
    from cnn_spmd.training.build import compile_train, feeds, prepare
    from experiments.alexnet_cifar import get_config

    config = get_config()
    data, model = mesh.parse(args.mesh)
    batch_size = args.batch * data * model
    examples = max(config.data.synthetic.train_examples, batch_size)
    config.update(
        dict(
            mesh=dict(data=data, model=model),
            parallelism=args.parallelism,
            batch_size=batch_size,
            steps_per_call=args.steps_per_call,
            steps=WARMUP + (REPEATS + 1) * args.steps,
        )
    )  # sets the schedule
    config.data.update(
        dict(
            name="synthetic",
            synthetic=dict(
                image_size=args.image_size,
                classes=CLASSES,
                train_examples=examples,
                test_examples=1,
            ),
        )
    )
    config.optimizer.update(
        dict(learning_rate=0.01, clip_norm=0.0)
    )  # as the peer's; the recipe's are for small images
    setup = prepare(config)
    n, seed = setup.config.steps_per_call, setup.config.seed
    since = time.perf_counter()
    program = compile_train(setup, n)
    compile_seconds = time.perf_counter() - since
    train_feed, _ = feeds(setup)
    train_feed.load()
    state, step = setup.steps.jit_init()(), 0

    def milliseconds(at_least: int) -> float:
        """Trains for whole calls of `at_least` steps or more; returns the milliseconds a step."""
        nonlocal state, step
        first, values = step, None
        jax.block_until_ready((state, train_feed.resident_data))
        since = time.perf_counter()
        starts = range(first, first + at_least, n)
        for inputs in train_feed.calls(
            order.train_indices(seed, start, n, batch_size, examples) for start in starts
        ):
            before, (state, values) = values, program(state, *inputs)
            jax.block_until_ready(
                before
            )  # the host is a call ahead at most, as in training/loop.py
            step += n
        jax.block_until_ready((state, values))
        seconds = time.perf_counter() - since
        loss = float(values["loss"][-1])
        if not math.isfinite(loss):
            raise ArithmeticError(f"loss is {loss}")
        losses.append(round(loss, 4))
        return round(1e3 * seconds / (step - first), 4)

    losses: list[float] = []
    milliseconds(WARMUP)
    times = [milliseconds(args.steps) for _ in range(REPEATS)]
    param_count = sum(x.size for x in jax.tree.leaves(setup.steps.abstract_state.params))
    print(
        json.dumps(
            dict(
                mesh=args.mesh,
                parallelism=args.parallelism,
                gpus=data * model,
                batch_per_gpu=args.batch,
                image_size=args.image_size,
                dtype=setup.config.dtype,
                param_count=param_count,
                steps_per_call=n,
                steps=args.steps,
                step_milliseconds=times,
                loss=losses[-1],
                compile_seconds=round(compile_seconds, 2),
            )
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
