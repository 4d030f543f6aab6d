"""Make results/pytorch.md: timings beside PyTorch (benchmarks/speed.py)."""

import pathlib
from collections.abc import Sequence

from cnn_spmd.papers.layout import HEAD, about_data, commands, joined
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report import compare
from cnn_spmd.report.text import markdown_table
from cnn_spmd.training import runfiles


def page() -> str:
    """Return the page of timings beside PyTorch."""
    one_gpu = runfiles.read_json(DATA / "speed" / "h100-x1.json")
    versions = one_gpu["peer_versions"]
    return joined(
        "# Beside PyTorch",
        HEAD,
        """Training steps of AlexNet at 224x224 in bfloat16, ours and PyTorch's in turn on one
        machine, each in a process of its own. PyTorch's step (`benchmarks/peer.py`) uses
        channels_last, bfloat16 autocast, torch.compile and fused SGD. Ours draws its batches,
        crops and mirrors from a data set on the device; PyTorch trains on one fixed batch.
        Neither clips gradients.""",
        speed_table(),
        f"""Ratio is ours divided by PyTorch's. % is the share of the card's own bfloat16 rate in an
        8192^3 matrix product, at {one_gpu["flop_per_image"] / 1e9:.2f} GFLOP per image. The
        last two columns are our throughput relative to our one-GPU step and to our step with
        scheme `data`. PyTorch {versions["torch"]}, jax {one_gpu["versions"]["jax"]}.
        {about_data()}""",
        """PyTorch's rate is that of its fastest mode measured. On the H100, and with DDP in most
        rows on several GPUs, only plain torch.compile was measured; its host is the limit at 32
        images per GPU and, with DDP, at 128. On one H200 CUDA graphs (`graphs`, its mode
        reduce-overhead) were measured, too. On two H200s at 128 images, the whole step of DDP in
        one CUDA graph was measured, with gradients sent as bfloat16 (`capture-bf16`).
        max-autotune, which searches for minutes, and FSDP2 are not measured.""",
        """The other two-GPU rows were measured before fc2's sums were scattered in
        hybrid_alternating. The two batches on one H200 were timed at the same time, each on a card
        of its own. The rows on four GPUs, and that of 128 images on two, are of three timings over
        at least 400 steps, the others of five over at least 30.
        [performance](../docs/performance.md) says what made our step fast.""",
        commands(
            "--peer_modes names PyTorch's modes; this is the command on four GPUs.",
            "python benchmarks/speed.py --gpus 4 --peer_modes compile",
        ),
    )


def speed_table(folder: pathlib.Path = DATA / "speed") -> str:
    """Return our fastest step beside PyTorch's fastest of the same machine, by batch.

    On several GPUs also relative to our own step on one, and to `data`, where they were measured.
    """
    batches = []
    for path in sorted(folder.glob("*.json")):
        run = runfiles.read_json(path)
        kind = compare.short_kind(run["hardware"]["device_kind"])
        batches += [(run["gpus"], kind, batch) for batch in run["batches"]]
    batches.sort(key=lambda row: (row[0], row[1], row[2]["batch_per_gpu"]))
    rows = [speed_row(*row) for row in batches]
    header = ["GPUs", "batch per GPU", "mesh, scheme", "ours, images/s", "PyTorch, images/s"]
    header += ["ratio", "ours, %", "PyTorch, %", "over 1 GPU", "over `data`"]
    return markdown_table(header, [row for row in rows if row])


def speed_row(gpus: int, kind: str, batch: dict) -> list[str]:
    """Return the cells of one batch; [] where a side failed or was not measured."""
    ours = fastest(batch["ours"], gpus)
    peer = fastest(batch["peer"], gpus)
    if ours is None or peer is None:
        return []
    one_gpu = fastest(batch["ours"], 1) if gpus > 1 else None
    data = fastest([row for row in batch["ours"] if row.get("parallelism") == "data"], gpus)
    rate = ours["images_per_second"]
    others = (one_gpu, data if gpus > 1 else None)
    return [
        f"{gpus} x {kind}",
        str(batch["batch_per_gpu"]),
        f"{ours['mesh']} {ours['parallelism']}",
        f"{rate:,}",
        f"{peer['images_per_second']:,} ({peer['name']})",
        f"{rate / peer['images_per_second']:.2f}",
        f"{100 * ours['matrix_share']:.0f}",
        f"{100 * peer['matrix_share']:.0f}",
        *(f"{rate / other['images_per_second']:.2f}" if other else "" for other in others),
    ]


def fastest(rows: Sequence[dict], gpus: int) -> dict | None:
    """Return the fastest timing on a number of GPUs; None where all failed."""
    done = [row for row in rows if "error" not in row and row["gpus"] == gpus]
    return max(done, key=lambda row: row["images_per_second"], default=None)
