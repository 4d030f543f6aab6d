"""Write the folders of invented runs and sweeps, and read the reports on them."""

import csv
import html
import json
import os
import pathlib
import re

from cnn_spmd.report import __main__ as report

TOP = [
    dict(
        name=f"kernel<{n}>" + "_long" * 10 * (n == 3),
        milliseconds=0.5 / n,
        count=n,
        communication=n == 2,
    )
    for n in range(1, 15)
]
PROFILE = dict(
    steps=20,
    devices=8,
    step_milliseconds=4.0,
    compute_milliseconds=2.75,
    communication_milliseconds=1.5,
    exposed_milliseconds=0.875,
    idle_milliseconds=0.375,
    top=TOP,
)


def a_run(
    mesh="1x1",
    speed=1000.0,
    parallelism="data",
    batch=128,
    seed=0,
    *,
    settings=None,
    status="completed",
    reason="",
    **more,
):
    """Return an entry of sweep.json with invented numbers; batch is per device."""
    data, model = map(int, mesh.split("x"))
    size = batch * data * model
    step = 1e3 * size / speed
    figures = dict(
        model="alexnet",
        mesh=dict(data=data, model=model),
        parallelism=parallelism,
        batch_size=size,
        images_per_second=speed,
        step_milliseconds=dict(p10=0.9 * step, median=step, p90=1.2 * step),
        bytes_per_device=dict(parameters=143_400_000 // model, optimizer=143_400_000 // model),
        ring_bytes=3_000_000 * data + 70_000 * model,
        closed_form_ring_bytes=3_100_000 * data,
        collectives=[
            collective("all-reduce", "data", 3_000_000 * data),
            collective("all-gather", "model", 70_000 * model),
        ],
    )
    figures |= figures_of_seed(seed)
    settings = dict(parallelism=parallelism, batch_per_device=batch, seed=seed) | (settings or {})
    name = ",".join([mesh, *(f"{key}={value}" for key, value in settings.items())])
    return dict(
        name=name,
        mesh=mesh,
        settings=settings,
        status=status,
        reason=reason,
        command="python launch.py",
        seconds=31.25,
        figures=figures | more if status == "completed" else {},
    )


def collective(operation, axis, ring_bytes):
    """Return a row of the collectives of a program."""
    shared = dict(phase="backward", count=1, bytes=9)
    return dict(operation=operation, axes=[axis], ring_bytes=ring_bytes) | shared


def figures_of_seed(seed):
    """Return the figures that do not depend on mesh and batch."""
    accuracy, loss = 0.5 + 0.01 * seed, 1.25 + seed
    return dict(
        dataset="synthetic",
        fallback=None,
        seed=seed,
        dtype="bfloat16",
        steps=100,
        epochs=None,
        steady_calls=9,
        train_seconds=12.5 + seed,
        compile_seconds=3.25,
        param_count=1000,
        accuracy=accuracy,
        loss=loss,
        eval=dict(accuracy=accuracy, loss=loss),
        peak_bytes=400_000_000,
        hidden_share=0.875,
        predicted_milliseconds=None,
        dense_microbatch=0,
        device_kind="NVIDIA H200",
        processes=1,
        profile=None,
    )


def metrics() -> str:
    """Return the lines of a metrics.jsonl."""
    rows = [
        dict(step=step, split="train", loss=2.0 - step / 100, accuracy=step / 200)
        for step in (20, 40, 60, 80, 100)
    ]
    return "".join(
        json.dumps(row) + "\n"
        for row in [*rows, dict(step=100, split="final", loss=1.25, accuracy=0.5)]
    )


def write_sweep(
    folder: pathlib.Path, runs: list[dict], device_kind="NVIDIA H200", **more
) -> pathlib.Path:
    """Write a sweep's folder; its completed runs have metrics only. Return the folder."""
    folder.mkdir(parents=True)
    hardware = dict(
        device_kind=device_kind,
        host_cores=32,
        versions=dict(jax="0.11.2", python="3.11.7"),
        commit="c" * 40,
    )
    sweep = (
        dict(
            experiment="alexnet_cifar",
            arguments=["--config", "experiments/alexnet_cifar.py"],
            devices=8,
            cpu_devices=None,
            started="2026-01-02T03:04:05+00:00",
            hardware=hardware,
            runs=runs,
        )
        | more
    )
    (folder / "sweep.json").write_text(json.dumps(sweep))
    for run in runs:
        if run["status"] == "completed":
            (folder / run["name"]).mkdir()
            (folder / run["name"] / "metrics.jsonl").write_text(metrics())
    return folder


def write_run(
    folder: pathlib.Path,
    mesh="1x1",
    speed=1000.0,
    seed=0,
    status="completed",
    batch_size=128,
    rate=0.1,
):
    """Write a run folder with the fields that the report reads; return it."""
    figures = a_run(mesh, speed, seed=seed)["figures"] | dict(batch_size=batch_size)
    config = dict(
        experiment="e",
        seed=seed,
        parallelism="data",
        batch_size=batch_size,
        mesh=figures["mesh"],
        optimizer=dict(learning_rate=rate),
    )
    summary = {
        name: value
        for name, value in figures.items()
        if name not in ("accuracy", "loss", "peak_bytes", "ring_bytes", "hidden_share")
    }
    summary |= dict(
        experiment="e",
        devices=8,
        host_cores=4,
        versions=dict(jax="0.11.2"),
        commit="d" * 40,
        started="now",
        status=status,
        config=config,
        eval=dict(accuracy=figures["accuracy"], loss=figures["loss"]),
    )
    program = dict(
        memory=dict(peak_bytes=figures["peak_bytes"]),
        totals=dict(ring_bytes=figures["ring_bytes"]),
        closed_form_ring_bytes=figures["closed_form_ring_bytes"],
        overlap=dict(hidden_share=figures["hidden_share"]),
    )
    folder.mkdir(parents=True)
    for name, content in dict(config=config, program=program, summary=summary).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text(metrics())
    return folder


def change(path: pathlib.Path, **fields) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def fifo(path: pathlib.Path) -> None:
    """Put a FIFO in the place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def written(capsys, *folders) -> tuple[str, str, list[dict], str]:
    """Return report.md, report.html, the rows of report.csv, and stderr."""
    assert report.main(list(map(str, folders))) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-3:] == [
        str(folders[0] / f"report.{kind}") for kind in ("md", "csv", "html")
    ]
    page, table = ((folders[0] / f"report.{kind}").read_text() for kind in ("html", "csv"))
    return (
        (folders[0] / "report.md").read_text(),
        page,
        list(csv.DictReader(table.splitlines())),
        printed.err,
    )


def cells_of(page: str) -> list[list[str]]:
    """Return the rows of all tables of an HTML page."""
    return [
        [
            html.unescape(re.sub("<[^>]*>", "", cell))
            for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", page)
    ]


def row_of(page: str, *start: str) -> list[str]:
    """Return the one row of an HTML page's tables that begins with these cells."""
    rows = [row for row in cells_of(page) if row[: len(start)] == list(start)]
    assert len(rows) == 1, (start, rows)
    return rows[0]


RUNS = [
    a_run("1x1", 1000.0),
    a_run("8x1", 5000.0, seed=0),
    a_run("8x1", 6000.0, seed=1),
    a_run("4x2", 7123.4, "hybrid"),
    a_run("1x1", 250.0, batch=32),
    a_run("8x1", 1500.5, batch=32),
    a_run("8x1", 99.5, batch=64),
]
BROKEN = [
    a_run("1x8", parallelism="two_tower", status="refused", reason="two towers | need <2> devices"),
    a_run("2x4", status="failed", reason="RESOURCE_EXHAUSTED: out of memory"),
    a_run("2x2", status="pending"),
]


def write_ranked_run(folder, seed=0, mean_rank=2.5):
    """Write a run whose evaluation has top5, examples and mean_rank; return it."""
    run = write_run(folder, seed=seed)
    evaluation = dict(accuracy=0.5, top5=0.875, loss=1.25, examples=100, mean_rank=mean_rank)
    change(run / "summary.json", eval=evaluation, dataset="digits")
    rows = [
        dict(step=50, split="eval", **evaluation),
        dict(step=100, split="final", **evaluation),
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return run
