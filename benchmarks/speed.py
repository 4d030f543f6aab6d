"""Time our training step and PyTorch's in turn, on one machine.

  python benchmarks/speed.py
  python benchmarks/speed.py --gpus 4 --batches 32,128,512     ours on 4x1, 1x4 and one GPU; DDP

Needs NVIDIA GPUs, and torch (pip install torch) or --skip_peer. It first measures the card's own
bfloat16 matrix rate and copy bandwidth. Then, for each batch, it runs ours.py on each mesh and
peer.py in each mode, each in a process of its own. It prints a table and writes one JSON file with
both sides, their ratio, versions and hardware. When a process fails, its reason is printed and
recorded, and the others still run. The table has the batches that both sides could time.

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
from typing import NamedTuple, NoReturn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from cnn_spmd.papers.pytorch import fastest, speed_table
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import runfiles
from cnn_spmd.training.provenance import provenance

HERE = pathlib.Path(__file__).resolve().parent
# A training step of AlexNet at 224x224 has 714,188,480 multiply-adds per image forward. The
# gradients of the weights and of the inputs take as many each. The first convolution (70,276,800)
# needs no gradient of its input. A multiply-add is 2 FLOP.
FLOP_PER_IMAGE = 2 * (3 * 714_188_480 - 70_276_800)
LIMIT = 600  # seconds after which a process is ended; PyTorch's max-autotune takes minutes


class Case(NamedTuple):
    """What runs for each batch: `command` is given to Python, with --batch added."""

    side: str
    name: str
    command: list[str]


def card() -> dict:
    """Return what JAX runs on; for a GPU also its rates (analysis/rates.py)."""
    import jax
    from jax.extend import backend

    from cnn_spmd.analysis import rates

    found = dict(
        platform=jax.default_backend(),
        device_kind=jax.devices()[0].device_kind,
        count=jax.device_count(),
        platform_version=" ".join(backend.get_backend().platform_version.split()),
    )
    if found["platform"] != "gpu":
        return found

    return found | dict(
        matrix_flop_per_second=round(rates.matrix_rate(rates.GPU)),
        copy_bytes_per_second=round(rates.copy_rate(rates.GPU)),
    )


def run(command: list[str]) -> dict:
    """Return the line of JSON that a Python command prints, or its error."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            # On this signal torchrun ends its workers.
            process.terminate()
            process.communicate()
            return dict(error=f"not done after {LIMIT} seconds")
    if process.returncode == 0:
        return json.loads(output.strip().splitlines()[-1])
    raised = re.findall(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception)\b.*)", errors, re.MULTILINE)
    reason = (raised or errors.strip().splitlines()[-1:] or ["no message"])[0]
    return dict(error=f"exit code {process.returncode}: {reason[:300]}")


def timed(command: list[str], matrix_rate: float) -> dict:
    """Return what a command measured, or its error.

    The result also has the median step, images/s and the share of the card's matrix rate.
    """
    row = run(command)
    if "error" in row:
        return row
    milliseconds = statistics.median(row["step_milliseconds"])
    rate_per_gpu = 1e3 * row["batch_per_gpu"] / milliseconds
    return row | dict(
        median_step_milliseconds=milliseconds,
        images_per_second=round(rate_per_gpu * row["gpus"]),
        matrix_share=round(rate_per_gpu * FLOP_PER_IMAGE / matrix_rate, 4),
    )


def refuse(reason: object) -> NoReturn:
    """Print why the input is refused, and exit."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batches", default="32,128,512,2048", help="images per GPU (default: %(default)s)"
    )
    parser.add_argument("--gpus", type=int, default=1, help="how many to use (default: 1)")
    parser.add_argument(
        "--meshes",
        help="ours: DATAxMODEL:PARALLELISM,... (default: 1x1:hybrid; on N GPUs also Nx1:data,"
        "1xN:hybrid,1xN:hybrid_alternating)",
    )
    parser.add_argument(
        "--peer_modes",
        help="eager, compile, graphs (torch.compile with CUDA graphs) or max (its max-autotune, "
        "which takes minutes), or capture (the whole step in one CUDA graph); on several GPUs "
        "-fsdp after it means FSDP2 instead of DDP, and -bf16 gradients sent as bfloat16 (default: "
        "compile,graphs,max,capture; on several GPUs compile-bf16,max-bf16,graphs-bf16,"
        "capture-bf16,compile-fsdp-bf16)",
    )
    parser.add_argument("--skip_peer", action="store_true", help="do not run PyTorch")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="a JSON file (default: results/data/speed/<card>-x<gpus>.json)",
    )
    # Used by this script for the process that measures the card.
    parser.add_argument("--card", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def our_cases(args: argparse.Namespace) -> list[Case]:
    """Return what --meshes asks for; refuse what it cannot mean."""
    n, found, used = args.gpus, [], set()
    default = "1x1:hybrid"
    if n > 1:
        default += f",{n}x1:data,1x{n}:hybrid,1x{n}:hybrid_alternating"
    for name in (args.meshes or default).split(","):
        match = re.fullmatch(r"(\d+)x(\d+):(\w+)", name)
        devices = int(match[1]) * int(match[2]) if match else 0
        if devices not in (1, n) or match[3] not in TABLE:
            refuse(
                f"--meshes: {name}: expected DATAxMODEL:PARALLELISM with a product of --gpus={n} "
                f"or 1, such as {n}x1:data; parallelism is one of {', '.join(TABLE)}"
            )
        used.add(devices)
        command = [
            str(HERE / "ours.py"),
            f"--mesh={match[1]}x{match[2]}",
            f"--parallelism={match[3]}",
        ]
        found.append(Case("ours", name, command))
    if n not in used:
        refuse(f"--meshes={args.meshes}: expected one of --gpus={n}, such as {n}x1:data")
    return found


def peer_cases(args: argparse.Namespace) -> list[Case]:
    """Return what --peer_modes asks for; refuse what it cannot mean."""
    n, found = args.gpus, []
    default = "compile,graphs,max,capture"
    if n > 1:
        default = "compile-bf16,max-bf16,graphs-bf16,capture-bf16,compile-fsdp-bf16"
    start = [str(HERE / "peer.py")]
    if n > 1:
        start = [
            *("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"),
            f"--nproc-per-node={n}",
            *start,
        ]
    for name in (args.peer_modes or default).split(","):
        match = re.fullmatch("(eager|compile|graphs|max|capture)(-fsdp)?(-bf16)?", name)
        if not match or (n == 1 and (match[2] or match[3])):
            refuse(
                f"--peer_modes: {name}: expected eager, compile, graphs, max or capture, and on "
                "several GPUs perhaps -fsdp and -bf16 after it"
            )
        flags = ["--fsdp"] * bool(match[2]) + ["--bf16_grads"] * bool(match[3])
        found.append(Case("peer", name, [*start, f"--mode={match[1]}", *flags]))
    return found


def check_hardware(args: argparse.Namespace) -> dict:
    """Return what `card` measures; refuse to run without what is needed."""
    hardware = run([__file__, "--card"])
    if hardware.get("platform") != "gpu":
        refuse(hardware.get("error") or f"no GPU here: JAX runs on {hardware['device_kind']}")
    if args.gpus > hardware["count"]:
        refuse(f"--gpus={args.gpus}: there are {hardware['count']}")
    if not args.skip_peer and not importlib.util.find_spec("torch"):
        refuse("torch is missing, which the peer needs: pip install torch, or give --skip_peer")
    smi = shutil.which("nvidia-smi")
    if smi:
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        hardware["driver"] = done.stdout.split()[0]
    return hardware


def describe(args: argparse.Namespace, hardware: dict) -> dict:
    """Return the result before anything is measured: where it comes from."""
    wheels = {
        wheel.name: wheel.version
        for wheel in importlib.metadata.distributions()
        if wheel.name.startswith(("nvidia-", "jax-cuda"))
    }
    return dict(
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


def measure(
    args: argparse.Namespace, cases: list[Case], result: dict, output: pathlib.Path
) -> None:
    """Run each case for each batch; `result` and its file grow with each measurement."""
    matrix_rate = result["hardware"]["matrix_flop_per_second"]
    for batch in args.batches.split(","):
        row = dict(batch_per_gpu=int(batch), ours=[], peer=[], ratio=None)
        result["batches"].append(row)
        for side, name, command in cases:
            measured = timed([*command, f"--batch={batch}"], matrix_rate)
            result["peer_versions"] = measured.pop("versions", result["peer_versions"])
            row[side].append(dict(name=name) | measured)
            ours, peer = (fastest(row[each], args.gpus) for each in ("ours", "peer"))
            if ours and peer:
                row["ratio"] = round(ours["images_per_second"] / peer["images_per_second"], 3)
            runfiles.write_json(output, result)
            shown = measured.get("images_per_second") or measured["error"]
            print(f"{batch} per GPU, {side} {name}: {shown}", flush=True)


def main() -> int:
    """Measure, write the file and print the table; return the exit code."""
    args = parse_arguments()
    if args.card:
        print(json.dumps(card()))
        return 0
    if args.gpus < 1:
        refuse(f"--gpus={args.gpus}: expected at least 1")
    cases = our_cases(args) + peer_cases(args)
    if args.skip_peer:
        cases = [case for case in cases if case.side == "ours"]
    if args.output and args.output.is_dir():
        refuse(f"--output={args.output}: is a folder, expected a file")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.batches):
        refuse(f"--batches={args.batches}: expected positive numbers joined by commas")
    hardware = check_hardware(args)
    slug = re.sub(r"\W+", "-", hardware["device_kind"].lower())
    output = args.output or DATA / "speed" / f"{slug}-x{args.gpus}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    result = describe(args, hardware)
    measure(args, cases, result, output)
    print(speed_table([result]), output, sep="\n")
    return int(not all(fastest(row["ours"], args.gpus) for row in result["batches"]))


if __name__ == "__main__":
    sys.exit(main())
