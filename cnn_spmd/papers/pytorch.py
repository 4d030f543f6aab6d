"""Make results/pytorch.md: timings beside PyTorch (benchmarks/speed.py)."""

from collections.abc import Sequence

from cnn_spmd.papers import meshes, predictions
from cnn_spmd.papers.layout import filled_in, table
from cnn_spmd.papers.summaries import DATA, load_folder
from cnn_spmd.report import compare
from cnn_spmd.training import runfiles

ON_FOUR = ("h200-x4", "h200-x4-512")  # files of results/data/speed


def page() -> str:
    """Return the page of timings beside PyTorch."""
    one_gpu = runfiles.read_json(DATA / "speed" / "h100-x1.json")
    gflop = one_gpu["flop_per_image"] / 1e9
    speeds = speed_table(load_folder(DATA / "speed"))
    of_32_and_128, of_512 = (
        runfiles.read_json(DATA / "speed" / f"{name}.json") for name in ON_FOUR
    )
    on_four = {  # images/s of PyTorch's modes, by batch
        batch["batch_per_gpu"]: {row["name"]: row["images_per_second"] for row in batch["peer"]}
        for batch in batches_on_four()
    }
    return filled_in(
        "pytorch.md",
        speeds=speeds,
        gflop=gflop,
        one_gpu=one_gpu,
        fsdp="{:,}, {:,} and {:,}".format(
            *(modes["compile-fsdp-bf16"] for modes in on_four.values())
        ),
        data_ratios="{:.2f}, {:.2f} and {:.2f}".format(*data_ratios()),
        day_32=of_32_and_128["started"].partition("T")[0],
        commit_32=of_32_and_128["commit"],
        day_512=of_512["started"].partition("T")[0],
        commit_512=of_512["commit"],
        graph_32=on_four[32]["capture-bf16"] / on_four[32]["compile-bf16"],
        graph_128=on_four[128]["capture-bf16"] / on_four[128]["compile-bf16"],
    )


def batches_on_four() -> list[dict]:
    """Return what was timed on four H200s, by rising batch."""
    files = (runfiles.read_json(DATA / "speed" / f"{name}.json") for name in ON_FOUR)
    return sorted(
        (batch for file in files for batch in file["batches"]), key=lambda row: row["batch_per_gpu"]
    )


def data_ratios() -> list[float]:
    """Return how many times as fast as DDP our scheme `data` is on four H200s, by rising batch."""
    sweep = runfiles.read_json(DATA / "sweeps" / f"{predictions.ALL_SCHEMES[4]}.json")
    ours = {
        meshes.batch_per_device(groups): group.average("images_per_second")
        for groups in meshes.sweep_panels(sweep)
        for group in groups
        if (group.parallelism, group.devices) == ("data", 4)
    }
    return [
        ours[batch["batch_per_gpu"]] / fastest(batch["peer"], 4)["images_per_second"]
        for batch in batches_on_four()
    ]


def speed_table(runs: Sequence[dict]) -> str:
    """Return our fastest step beside PyTorch's fastest of the same machine, by batch.

    runs: what benchmarks/speed.py wrote. On several GPUs also relative to our own step on one, and
    to `data`, where they were measured. "" where no batch has times of both sides.
    """
    batches = []
    for run in runs:
        kind = compare.short_kind(run["hardware"]["device_kind"])
        batches += [(run["gpus"], kind, batch) for batch in run["batches"]]
    batches.sort(key=lambda row: (row[0], row[1], row[2]["batch_per_gpu"]))
    rows = [row for each in batches if (row := speed_row(*each))]
    return table(rows) if rows else ""


def speed_row(gpus: int, kind: str, batch: dict) -> dict[str, str]:
    """Return the cells of one batch; {} where a side failed or was not measured."""
    ours = fastest(batch["ours"], gpus)
    peer = fastest(batch["peer"], gpus)
    if ours is None or peer is None:
        return {}
    one_gpu = fastest(batch["ours"], 1) if gpus > 1 else None
    by_data = [row for row in batch["ours"] if row.get("parallelism") == "data"]
    data = fastest(by_data, gpus) if gpus > 1 else None
    rate = ours["images_per_second"]
    return {
        "GPUs": f"{gpus} x {kind}",
        "batch per GPU": str(batch["batch_per_gpu"]),
        "mesh, scheme": f"{ours['mesh']} {ours['parallelism']}",
        "ours, images/s": f"{rate:,}",
        "PyTorch, images/s": f"{peer['images_per_second']:,} ({peer['name']})",
        "ratio": f"{rate / peer['images_per_second']:.2f}",
        "ours, %": f"{100 * ours['matrix_share']:.0f}",
        "PyTorch, %": f"{100 * peer['matrix_share']:.0f}",
        "over 1 GPU": f"{rate / one_gpu['images_per_second']:.2f}" if one_gpu else "",
        "over `data`": f"{rate / data['images_per_second']:.2f}" if data else "",
    }


def fastest(rows: Sequence[dict], gpus: int) -> dict | None:
    """Return the fastest timing on a number of GPUs; None where all failed."""
    done = [row for row in rows if row.get("gpus") == gpus]  # one that failed has no gpus
    return max(done, key=lambda row: row["images_per_second"], default=None)
