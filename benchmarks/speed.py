"""Times our training step and PyTorch's in turn, on one machine: python benchmarks/speed.py

Needs NVIDIA GPUs and torch (pip install torch), or --skip_peer. First the card's own bfloat16 matrix rate and copy bandwidth;
then, for each batch, ours.py on each mesh and peer.py in each mode: each in a process of its own. Writes one JSON with both,
their ratio, versions and hardware, and prints a table. A process that fails is recorded with its reason; the rest goes on.

  python benchmarks/speed.py --gpus 4 --batches 32,128,512     several GPUs: ours on 4x1, 1x4 and one, the peer under torchrun

Exit codes: 0 done; 1 a batch has no time of ours; 2 bad input, or no GPU.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

HERE = pathlib.Path(__file__).resolve().parent
# A training step of AlexNet at 224x224, an image: 714,188,480 multiply-adds forward, as many for the gradient of the weights,
# as many for that of the inputs, which the first convolution (70,276,800) does not need; 2 FLOP each. 4.14 GFLOP.
FLOP_PER_IMAGE = 2 * (3 * 714_188_480 - 70_276_800)


def card() -> dict:
    """What JAX runs on; of a GPU also its rates: bfloat16 products of 8192x8192 matrices, and bytes read plus written."""
    import jax
    import jax.numpy as jnp
    from jax.extend import backend

    found = dict(
        platform=jax.default_backend(),
        device_kind=jax.devices()[0].device_kind,
        count=jax.device_count(),
        platform_version=" ".join(backend.get_backend().platform_version.split()),
    )
    if found["platform"] != "gpu":
        return found

    def seconds(function: Callable, *arrays: jax.Array) -> float:
        function, times = jax.jit(function), []
        for _ in range(6):  # the first warms up
            since = time.perf_counter()
            for _ in range(30):
                result = function(*arrays)
            result.block_until_ready()
            times.append((time.perf_counter() - since) / 30)
        return statistics.median(times[1:])

    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    x = jnp.zeros(2**27, jnp.float32)
    return found | dict(
        matrix_flop_per_second=round(2 * 8192**3 / seconds(jnp.matmul, a, b)),
        copy_bytes_per_second=round(2 * x.nbytes / seconds(lambda x: x + 1, x)),
    )


def run(command: list[str], limit: float) -> dict:
    """The line of JSON that the Python command prints; or its error."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers at this
            process.communicate()
            return dict(error=f"not done after {limit:g} seconds")
    if process.returncode == 0:
        return json.loads(output.strip().splitlines()[-1])
    raised = re.findall(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception)\b.*)", errors, re.MULTILINE)
    reason = (raised or errors.strip().splitlines()[-1:] or ["no message"])[0]
    return dict(error=f"exit code {process.returncode}: {reason[:300]}")


def timed(command: list[str], limit: float, matrix_rate: float) -> dict:
    """What the command measured, with its median step, images a second and share of the GPUs' matrix rate; or its error."""
    row = run(command, limit)
    if "error" in row:
        return row
    milliseconds = statistics.median(row["step_milliseconds"])
    rate = 1e3 * row["batch_per_gpu"] / milliseconds  # of one GPU
    return row | dict(
        median_step_milliseconds=milliseconds,
        images_per_second=round(rate * row["gpus"]),
        matrix_share=round(rate * FLOP_PER_IMAGE / matrix_rate, 4),
    )


def best(rows: list[dict], gpus: int) -> dict | None:
    """The fastest of those that use all the GPUs: on several, ours has one that uses a single one."""
    return max(
        (row for row in rows if row.get("gpus") == gpus),
        key=lambda row: row["images_per_second"],
        default=None,
    )


def table(batches: list[dict], gpus: int) -> str:
    """A line a batch: our best and the peer's, images/s, share of the matrix rate, ratio; then what failed."""
    lines, failed = [f"batch/GPU  {'ours':<38}{'PyTorch':<32}ratio"], []
    for row in batches:
        line = f"{row['batch_per_gpu']:>9}  "
        for side, width in (("ours", 38), ("peer", 32)):
            top = best(row[side], gpus)
            text = (
                f"{top['images_per_second']:,} {top['matrix_share']:.0%} {top['name']}"
                if top
                else "-"
            )
            line += f"{text:<{width}}"
            failed += [
                f"{row['batch_per_gpu']:>9}  {x['name']}: {x['error']}"
                for x in row[side]
                if "error" in x
            ]
        lines.append(line + str(row["ratio"] or "-"))
    return "\n".join(lines + failed)


def refuse(reason: object) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def cases(args: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """What runs for each batch: ours or peer, its name, its command without the batch. Refuses bad flags."""
    from cnn_spmd.sharding.table import TABLE

    n, found, used = args.gpus, [], set()
    for name, low in dict(gpus=1, steps_per_call=0, limit=1).items():
        if (value := getattr(args, name)) < low:
            refuse(f"--{name}={value}: expected at least {low}")
    default = "1x1:hybrid" + f",{n}x1:data,1x{n}:hybrid,1x{n}:hybrid_alternating" * (n > 1)
    for name in (args.meshes or default).split(","):
        match = re.fullmatch(r"(\d+)x(\d+):(\w+)", name)
        devices = int(match[1]) * int(match[2]) if match else 0
        if devices not in (1, n) or match[3] not in TABLE:
            refuse(
                f"--meshes: {name}: expected DATAxMODEL:PARALLELISM with a product of --gpus={n} or 1, such as {n}x1:data; "
                f"parallelism is one of {', '.join(TABLE)}"
            )
        used.add(devices)
        found.append(
            (
                "ours",
                name,
                [
                    str(HERE / "ours.py"),
                    f"--mesh={match[1]}x{match[2]}",
                    f"--parallelism={match[3]}",
                    f"--steps_per_call={args.steps_per_call}",
                ],
            )
        )
    if n not in used:
        refuse(f"--meshes={args.meshes}: expected one of --gpus={n}, such as {n}x1:data")
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=localhost",
        f"--nproc-per-node={n}",
    ] * (n > 1)
    for name in (
        args.peer_modes or ("compile,graphs,max" if n == 1 else "compile,max,compile-bf16,max-bf16")
    ).split(","):
        match = re.fullmatch("(eager|compile|graphs|max)(-bf16)?", name)
        if not match or (match[2] and n == 1):
            refuse(
                f"--peer_modes: {name}: expected eager, compile, graphs or max, or, on several GPUs, one of them with -bf16"
            )
        bf16 = ["--bf16_grads"] if match[2] else []
        found.append(
            ("peer", name, [*torchrun, str(HERE / "peer.py"), f"--mode={match[1]}", *bf16])
        )
    return [case for case in found if case[0] == "ours" or not args.skip_peer]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batches", default="32,128,512,2048", help="images a GPU (default: %(default)s)"
    )
    parser.add_argument("--gpus", type=int, default=1, help="how many to use (default: 1)")
    parser.add_argument(
        "--meshes",
        help="ours: DATAxMODEL:PARALLELISM,... (default: 1x1:hybrid; on N GPUs also Nx1:data,"
        "1xN:hybrid,1xN:hybrid_alternating)",
    )
    parser.add_argument(
        "--steps_per_call", type=int, default=0, help="ours; 0: as the config resolves it (default)"
    )
    parser.add_argument(
        "--peer_modes",
        help="eager, compile, graphs (torch.compile with CUDA graphs), max (its max-autotune, "
        "minutes); with -bf16 gradients travel as bfloat16 (default: compile,graphs,max; on several GPUs "
        "compile and max, each also with -bf16)",
    )
    parser.add_argument("--skip_peer", action="store_true")
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds for a process (default: 600)"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="default: results/data/speed/<card>-x<gpus>.json"
    )
    parser.add_argument(
        "--card", action="store_true", help=argparse.SUPPRESS
    )  # the process that measures it
    args = parser.parse_args()
    if args.card:
        print(json.dumps(card()))
        return 0
    sys.path.insert(0, str(HERE.parent))
    todo = cases(args)
    if args.output and args.output.is_dir():
        refuse(f"--output={args.output}: is a folder, expected a file")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.batches):
        refuse(f"--batches={args.batches}: expected positive numbers joined by commas")
    hardware = run([__file__, "--card"], args.limit)
    if hardware.get("platform") != "gpu":
        refuse(hardware.get("error") or f"no GPU here: JAX runs on {hardware['device_kind']}")
    if args.gpus > hardware["count"]:
        refuse(f"--gpus={args.gpus}: there are {hardware['count']}")
    if not args.skip_peer and not importlib.util.find_spec("torch"):
        refuse("torch is missing, which the peer needs: pip install torch, or give --skip_peer")

    from cnn_spmd.training import runfiles
    from cnn_spmd.training.provenance import provenance

    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        hardware["driver"] = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()[0]
    wheels = {
        wheel.name: wheel.version
        for wheel in importlib.metadata.distributions()
        if wheel.name.startswith(("nvidia-", "jax-cuda"))
    }
    result = dict(
        arguments=sys.argv[1:],
        hardware=hardware,
        gpus=args.gpus,
        flop_per_image=FLOP_PER_IMAGE,
        **provenance(),
        peer_versions=None,
        wheels=wheels,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        batches=[],
    )
    slug = re.sub(r"\W+", "-", hardware["device_kind"].lower())
    output = args.output or HERE.parent / "results" / "data" / "speed" / f"{slug}-x{args.gpus}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    for batch in args.batches.split(","):
        row = dict(batch_per_gpu=int(batch), ours=[], peer=[], ratio=None)
        result["batches"].append(row)
        for side, name, command in todo:
            measured = timed(
                [*command, f"--batch={batch}"], args.limit, hardware["matrix_flop_per_second"]
            )
            result["peer_versions"] = measured.pop("versions", result["peer_versions"])
            row[side].append(dict(name=name) | measured)
            ours, peer = (best(row[side], args.gpus) for side in ("ours", "peer"))
            row["ratio"] = (
                round(ours["images_per_second"] / peer["images_per_second"], 3)
                if ours and peer
                else None
            )
            runfiles.write_json(output, result)  # after each: what is measured is kept
            print(
                f"{batch} a GPU, {side} {name}: {measured.get('images_per_second') or measured['error']}",
                flush=True,
            )
    print(table(result["batches"], args.gpus), output, sep="\n")
    return int(not all(best(row["ours"], args.gpus) for row in result["batches"]))


if __name__ == "__main__":
    sys.exit(main())
