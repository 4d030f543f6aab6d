"""Make the Markdown tables of the pages in results/ from results/data.

*.json and claims/*.json are summaries of runs (measured.py). sweeps/*.json are each the sweep.json
of a sweep. programs/*.json are reports of compiled programs (benchmarks/programs.py), speed/*.json
timings beside PyTorch (benchmarks/speed.py), and rates/*.json the summaries of runs by which an
experiment's learning rates were chosen. MB are 1e6 bytes.
"""

import collections
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence

from cnn_spmd.papers import published
from cnn_spmd.papers.measured import DATA, is_beside_a_paper, load_summaries
from cnn_spmd.report import compare, run_tables, text
from cnn_spmd.report.text import markdown_table, mean_and_deviation
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import runfiles

# ---- Runs


# Ends the name of a short run's experiment, which was alone on its GPU and measures only the speed.
ALONE = "_alone"


def results_table(dataset: str, folder: pathlib.Path = DATA) -> str:
    """Return the runs on a data set; runs that differ only in their seed share a row.

    Runs that stand beside a paper's figure are left out: the papers' tables have them. So are short
    runs that measure only a speed.
    """
    groups = collections.defaultdict(list)
    for run in load_summaries(folder):
        for_speed = run["experiment"].endswith(ALONE)
        if run["dataset"] == dataset and not for_speed and not is_beside_a_paper(run):
            groups[results_key(run)].append(run)
    header = ["experiment", "hardware", "mesh, scheme", "epochs", "n"]
    header += ["test accuracy, %", "train, s", "compile, s", "images/s"]
    return markdown_table(header, [results_row(runs) for _, runs in sorted(groups.items())])


def results_key(run: dict) -> tuple:
    """Return what runs in one row share, in the order of the rows."""
    return (
        run["experiment"],
        run["device_kind"],
        run["devices"],
        -run["mesh"]["data"],
        run["parallelism"],
        run["epochs"],
        compare.machine(run),
        compare.recipe(run),
    )


def results_row(runs: Sequence[dict]) -> list[str]:
    """Return the cells of runs that differ in nothing but their seed."""
    run = runs[0]
    return [
        run["experiment"].removesuffix(f"_{run['dataset']}"),
        compare.machine(run),
        f"{compare.mesh_name(run['mesh'].values())} {run['parallelism']}",
        f"{run['epochs']:g}",
        str(len(runs)),
        mean_and_deviation([100 * run["eval"]["accuracy"] for run in runs], 2),
        mean_and_deviation([run["train_seconds"] for run in runs], 1),
        # The first seed compiles; the others may find its program in the cache.
        f"{max(run['compile_seconds'] for run in runs):.1f}",
        mean_and_deviation([run["images_per_second"] for run in runs], 0),
    ]


# ---- Sweeps

SWEEP_HEADER = ["mesh", "scheme", "n", "MB per device", "images/s", "step, ms (p10 to p90)"]
SWEEP_HEADER += ["speedup", "ring MB per step"]


def sweep_tables(sweep: dict) -> dict[str, str]:
    """Return one table per batch: a row for each mesh and scheme, seeds averaged."""

    def batch_per_device(panel: list[dict]) -> int:
        return panel[0]["runs"][0]["figures"]["batch_size"] // panel[0]["devices"]

    panels = compare.panels_of(compare.groups_of(sweep["runs"]))
    panels.sort(key=batch_per_device)
    return {panel[0]["panel"]: sweep_table(panel) for panel in panels}


def sweep_table(groups: Sequence[dict]) -> str:
    """Return the table of one panel; accuracies where the data are no random images."""
    rows = []
    for group in groups:
        row = run_tables.comparison_row(group)
        cells = [row["mesh"], row["parallelism"], row["n"]]
        cells.append(row["parameters and optimizer, MB per device"])
        cells += [row["images/s"], row["step, ms (p10 to p90)"], row["speedup"]]
        rows.append([*cells, row["ring MB per step"], row["test accuracy, %"]])
    if groups[0]["runs"][0]["figures"]["dataset"] == "synthetic":
        return markdown_table(SWEEP_HEADER, [row[:-1] for row in rows])
    return markdown_table([*SWEEP_HEADER, "test accuracy, %"], rows)


def sweep_command(sweep: dict) -> str:
    """Return the command of a sweep, put together for files that do not have it.

    Those have the arguments that all runs share.
    """
    if sweep.get("command"):
        return sweep["command"]
    meshes = dict.fromkeys(run["mesh"] for run in sweep["runs"])
    swept: dict[str, dict[str, None]] = {}
    for run in sweep["runs"]:
        for name, value in run["settings"].items():
            swept.setdefault(name, {})[str(value)] = None
    arguments = [*sweep["arguments"], f"--mesh {','.join(meshes)}"]
    for name, values in swept.items():
        flag = "--batch_per_device " if name == "batch_per_device" else f"--sweep {name}="
        arguments.append(flag + ",".join(values))
    return f"python launch.py {' '.join(arguments)}"


# ---- PyTorch


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


# ---- Compiled programs

PROGRAM_HEADER = ["mesh", "scheme", "MB per device", "peak MB", "collectives per step"]
PROGRAM_HEADER += ["ring MB per step", "closed form", "hidden, %"]
SIDE_BY_SIDE = dict(image_size=224, devices=8)  # the programs that show all schemes side by side


def load_programs(folder: pathlib.Path = DATA / "programs") -> list[dict]:
    """Return the reports of compiled programs in the order of the page."""
    programs = [runfiles.read_json(path) for path in folder.glob("*.json")]

    def place(run: dict) -> tuple:
        shape = (list(run["mesh"].values()), run["parallelism"], run.get("in_flight", 1))
        network = (run["image_size"], run["devices"], run["compiler"]["platform"], run["model"])
        return network + shape

    return sorted(programs, key=place)


def program_tables(programs: Sequence[dict]) -> dict[str, str]:
    """Return one table per network and target: what a device holds and sends."""
    tables: dict[str, list[list[str]]] = {}
    for run, cells in program_rows(programs):
        kind = run["compiler"]["device_kind"]
        target = "CPU devices" if kind == "cpu" else compare.short_kind(kind)
        title = (
            f"{run['model']}, {run['image_size']}x{run['image_size']} images, "
            f"{run['devices']} x {target}, batch {run['batch_size']}"
        )
        tables.setdefault(title, []).append(cells)
    return {title: markdown_table(PROGRAM_HEADER, rows) for title, rows in tables.items()}


def program_rows(programs: Sequence[dict]) -> Iterator[tuple[dict, list[str]]]:
    """Yield each program and its cells under PROGRAM_HEADER.

    In parentheses is the hidden share with more collectives in flight.
    """
    in_flight = {program_key(run): run for run in programs if run.get("in_flight", 1) > 1}
    for run in programs:
        if run.get("in_flight", 1) > 1:  # files of older versions lack it
            continue
        counts: collections.Counter[str] = collections.Counter()
        for row in run["collectives"]:
            counts[row["operation"].removeprefix("collective-")] += row["count"]
        hidden = text.optional(runfiles.hidden_share(run), 0, 100) or "-"
        if other := in_flight.get(program_key(run)):
            hidden += f" ({text.optional(runfiles.hidden_share(other), 0, 100)})"
        yield (
            run,
            [
                compare.mesh_name(run["mesh"].values()),
                run["parallelism"],
                f"{run['bytes_per_device']['parameters'] / 1e6:.1f}",
                text.optional(run["memory"]["peak_bytes"], 0, 1e-6) or "-",
                ", ".join(f"{count} {operation}" for operation, count in sorted(counts.items())),
                f"{run['totals']['ring_bytes'] / 1e6:.1f}",
                text.optional(run["closed_form_ring_bytes"], 1, 1e-6) or "-",
                hidden,
            ],
        )


def schemes_table(programs: Sequence[dict], sweeps: pathlib.Path = DATA / "sweeps") -> str:
    """Return a row for each scheme, of its program for SIDE_BY_SIDE on GPUs.

    The mesh is one that splits both axes, where there is one. timed: whether a sweep has run the
    scheme on several GPUs.
    """
    timed = set()
    for path in sweeps.glob("*.json"):
        for run in runfiles.read_json(path)["runs"]:
            figures = run["figures"] or dict(device_kind="cpu")  # {} where it failed
            if run["mesh"] != "1x1" and figures["device_kind"] != "cpu":
                timed.add(figures["parallelism"])
    columns = ["mesh", "MB per device", "peak MB", "ring MB per step", "hidden, %"]
    found: dict[str, list[str]] = {}
    for run, cells in program_rows(programs):
        shown = all(run[field] == value for field, value in SIDE_BY_SIDE.items())
        scheme, splits_both = run["parallelism"], min(run["mesh"].values()) > 1
        on_gpus = run["compiler"]["platform"] != "cpu"
        if shown and on_gpus and (splits_both or scheme not in found):
            row = dict(zip(PROGRAM_HEADER, cells, strict=True))
            chosen = [row[column] for column in columns]
            found[scheme] = [scheme, run["model"], *chosen, "yes" if scheme in timed else "no"]
    rows = [found[scheme] for scheme in TABLE if scheme in found]
    return markdown_table(["scheme", "network", *columns, "timed on GPUs"], rows)


def program_key(run: dict) -> tuple:
    """Return what tells programs apart, except for the collectives in flight."""
    mesh = compare.mesh_name(run["mesh"].values())
    kind = run["compiler"]["device_kind"]
    return run["model"], run["image_size"], run["parallelism"], kind, mesh


def claims_table(programs: Sequence[dict]) -> str:
    """Return what two schemes save beside the older ones, per mesh of H100s."""
    found = {
        (run["image_size"], compare.mesh_name(run["mesh"].values()), run["parallelism"]): run
        for run in programs
        if run["compiler"]["platform"] != "cpu" and run.get("in_flight", 1) == 1
    }
    rows = []
    for (size, mesh, scheme), run in found.items():
        if scheme == "dense_2d" and min(run["mesh"].values()) > 1:
            what, older = "dense ring MB, of hybrid's", found[size, mesh, "hybrid"]
            mine, theirs = dense_ring_bytes(run), dense_ring_bytes(older)
            published = "1/2"
        elif scheme == "sharded_update":
            what, older = "MB updated per device, of data's", found[size, mesh, "data"]
            mine, theirs = (each["bytes_per_device"]["parameters"] for each in (run, older))
            published = f"1/{run['devices']}"
        else:
            continue
        cells = [scheme, mesh, f"{size}x{size}", str(run["batch_size"]), what]
        numbers = f"{mine / 1e6:.1f} / {theirs / 1e6:.1f}"
        rows.append([*cells, numbers, f"{mine / theirs:.3f}", published])
    header = ["scheme", "mesh", "images", "batch", "what", "MB", "share", "published"]
    return markdown_table(header, sorted(rows))


def dense_ring_bytes(run: dict) -> int:
    """Return the ring bytes without the gradients of the convolutions.

    Those are what a mesh of two axes sums over both of them.
    """
    of_convolutions = [
        row["ring_bytes"]
        for row in run["collectives"]
        if row["operation"] == "all-reduce" and len(row["axes"]) == 2
    ]
    return run["totals"]["ring_bytes"] - sum(of_convolutions)


# ---- Depth

# Network of experiments/deeper_cifar.py -> layers with weights, how many are convolutions.
DEEPER = {
    "fully_connected": (2, 0),
    "simple_cnn": (2, 1),
    "one_convolution": (4, 1),
    "alexnet": (8, 5),
    "vgg_8": (8, 5),
    "vgg_11": (11, 8),
    "vgg_16": (16, 13),
}


def runs_by_depth(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Return the runs of each network of DEEPER that was run, in its order."""
    found = {}
    for name in DEEPER:
        same = [run for run in runs if run["experiment"] == f"deeper_{name}"]
        if same:
            found[name] = same
    return found


def depth_table(runs: Sequence[dict]) -> str:
    """Return accuracy by depth, a row for each network of experiments/deeper_cifar.py."""
    rows = []
    for name, same in runs_by_depth(runs).items():
        layers, convolutions = DEEPER[name]
        size = f"{same[0]['param_count']:,}"
        accuracy = mean_and_deviation([100 * run["eval"]["accuracy"] for run in same], 2)
        rows.append([name, str(layers), str(convolutions), size, str(len(same)), accuracy])
    header = ["network", "layers with weights", "convolutions", "parameters", "n"]
    return markdown_table([*header, "test accuracy, %"], rows)


# Experiment of experiments/resnet_cifar.py without its depth -> the name of the series.
SERIES = {"resnet_cifar": "ResNet", "resnet_cifar_plain": "plain"}


def residual_table(runs: Sequence[dict]) -> str:
    """Return error and speed of the residual and the plain networks; "" without runs.

    Runs that shared a GPU say nothing of its speed: then a short run alone does, of an experiment
    whose name ends in ALONE.
    """
    alone = {run["experiment"]: run for run in runs if run["experiment"].endswith(ALONE)}
    groups = collections.defaultdict(list)
    for run in runs:
        series, _, layers = run["experiment"].rpartition("_")
        if series in SERIES:
            key = (series, int(layers), compare.machine(run), compare.recipe(run))
            groups[key].append(run)
    rows = []
    for (series, layers, machine, _), same in sorted(groups.items()):
        error, millions = "", ""
        timed = [alone[name]] if (name := same[0]["experiment"] + ALONE) in alone else same
        rates = [run["images_per_second"] for run in timed]
        images = same[0]["steps"] * same[0]["batch_size"]
        if series == "resnet_cifar":
            error, millions = map(str, published.RESIDUAL_NETWORKS[layers])
        rows.append(
            [
                f"{SERIES[series]}-{layers}",
                f"{same[0]['param_count']:,}",
                millions,
                machine,
                str(len(same)),
                error,
                mean_and_deviation([100 * (1 - run["eval"]["accuracy"]) for run in same], 2),
                mean_and_deviation([images / rate for rate in rates], 0),
                mean_and_deviation(rates, 0),
            ]
        )
    header = ["network", "parameters", "published, M", "hardware", "n", "published error, %"]
    header += ["error, %", "train, s", "images/s"]
    return markdown_table(header, rows) if rows else ""


# ---- Batches

# Experiment, without _variable -> the name of its data in the table.
BATCH_DATA = {"owt_cifar": "CIFAR-10", "owt_imagenette": "Imagenette"}
RATES = {1.0: "k", 0.5: "sqrt(k)"}


def published_batch_errors() -> dict[tuple[str, int], float]:
    """Return the paper's errors by dense batch (in the table's words) and batch."""
    errors = {}
    for gpus, dense_batch, error, *_ in published.ONE_WEIRD_TRICK:
        dense = "128" if dense_batch == 128 and gpus > 1 else "as large"
        errors[dense, 128 * gpus] = error
    return errors


def batch_table(runs: Sequence[dict], paper: dict[tuple[str, int], float] | None = None) -> str:
    """Return test error in % by batch size, of the runs of experiments/owt_*.py.

    paper: the paper's errors on ImageNet, by default published_batch_errors().
    """
    paper = published_batch_errors() if paper is None else paper
    errors: dict[tuple[str, str, int], list[float]] = {
        ("ILSVRC-2012, published", f"k, {dense}", batch): [error]
        for (dense, batch), error in paper.items()
    }
    for run in runs:
        data = BATCH_DATA.get(run["experiment"].removesuffix("_variable"))
        if data:
            dense = "128" if run["config"]["dense_microbatch"] else "as large"
            rate = RATES[run["config"]["optimizer"]["scaling"]]
            key = (data, f"{rate}, {dense}", run["batch_size"])
            errors.setdefault(key, []).append(100 * (1 - run["eval"]["accuracy"]))
    return errors_table(errors, "rate times, dense batch")


def errors_table(errors: dict[tuple[str, str, int], list[float]], setting_name: str) -> str:
    """Return errors in % by data, setting and batch, a column for each batch."""
    batches = sorted({batch for *_, batch in errors})
    rows = []
    for data, setting in dict.fromkeys((data, setting) for data, setting, _ in errors):
        found = [errors.get((data, setting, batch), []) for batch in batches]
        counts = dict.fromkeys(str(len(row)) for row in found if row)
        means = (mean_and_deviation(row, 2) for row in found)
        rows.append([data, setting, "/".join(counts), *means])
    header = ["data", setting_name, "n", *(f"batch {batch}" for batch in batches)]
    return markdown_table(header, rows)


# Part of an experiment's name -> the name of its data in the table.
LARGE_BATCH_DATA = {"cifar": "CIFAR-10", "imagenette": "Imagenette"}


def large_batch_errors(runs: Sequence[dict]) -> dict[tuple[str, str, int], list[float]]:
    """Return data, "network, rule" and batch -> errors in %.

    The runs are those of experiments/large_batch_cifar.py, whose experiments are named
    large_batch_cifar_lars_bn, large_batch_imagenette_linear, ...
    """
    errors: dict[tuple[str, str, int], list[float]] = {}
    for run in runs:
        if run["experiment"].startswith("large_batch_"):
            data, rule, *bn = run["experiment"].removeprefix("large_batch_").split("_")
            network = "AlexNet-BN" if bn else "AlexNet"
            key = (LARGE_BATCH_DATA[data], f"{network}, {rule}", run["batch_size"])
            errors.setdefault(key, []).append(100 * (1 - run["eval"]["accuracy"]))
    return dict(sorted(errors.items()))


def large_batch_table(runs: Sequence[dict]) -> str:
    """Return large_batch_errors as a table; "" without runs."""
    errors = large_batch_errors(runs)
    return errors_table(errors, "network, rule") if errors else ""


# ---- Learning rates


def rates_table(runs: Sequence[dict], prefix: str, value_of: Callable[[dict], str]) -> str:
    """Return a value by experiment (without its prefix) and learning rate."""
    cells: dict[tuple[str, float], list[str]] = {}
    for run in runs:
        name = run["experiment"].removeprefix(prefix)
        rate = run["config"]["optimizer"]["learning_rate"]
        cells.setdefault((name, rate), []).append(value_of(run))
    rates = sorted({rate for _, rate in cells})
    rows = [
        [name, *("; ".join(cells.get((name, rate), [])) for rate in rates)]
        for name in dict.fromkeys(name for name, _ in cells)
    ]
    return markdown_table(["variant", *(f"rate {rate:g}" for rate in rates)], rows)


# ---- Predictions


def predictions_table(predictions: Sequence[dict]) -> str:
    """Return measured and predicted milliseconds, a row per mesh and scheme, a column per batch.

    What is not measured has its prediction alone.
    """
    batches = sorted({row["batch_per_device"] for row in predictions})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in predictions:
        predicted = row["predicted_milliseconds"]
        text = f"{predicted:.3f}"
        if measured := row.get("measured_milliseconds"):
            text = f"{measured:.3f}, {text} ({100 * (predicted / measured - 1):+.1f} %)"
        cells.setdefault((row["mesh"], row["parallelism"]), {})[row["batch_per_device"]] = text
    rows = [[*key, *(own.get(batch, "") for batch in batches)] for key, own in cells.items()]
    return markdown_table(["mesh", "scheme", *(f"{batch} per GPU" for batch in batches)], rows)


def estimates_table(predictions: Sequence[dict]) -> str:
    """Return measured and estimated milliseconds of steps of one GPU, a row per network."""
    rows = []
    for row in predictions:
        measured, predicted = row["measured_milliseconds"], row["predicted_milliseconds"]
        error = f"{100 * (predicted / measured - 1):+.1f}"
        name = f"{row['experiment']}, {row['image_size']} px"
        batch = str(row["batch_per_device"])
        rows.append([name, row["card"], batch, f"{measured:.3f}", f"{predicted:.3f}", error])
    header = ["experiment", "card", "batch", "measured, ms", "estimated, ms", "error, %"]
    return markdown_table(header, rows)


def estimate_errors(predictions: Sequence[dict]) -> str:
    """Return a sentence on the errors of estimates."""
    errors = errors_of(predictions)
    within = sum(error <= 0.1 for error in errors)
    return (
        f"Median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %; "
        f"{within} of {len(errors)} are within 10 %."
    )


def errors_of(predictions: Sequence[dict]) -> list[float]:
    """Return how far predicted steps are from the measured ones, as shares of these."""
    return [
        abs(row["predicted_milliseconds"] / row["measured_milliseconds"] - 1) for row in predictions
    ]


def prediction_errors(predictions: Sequence[dict]) -> str:
    """Return a sentence on the errors, and on whether the fastest was named right."""
    errors = errors_of(predictions)
    named = []
    for batch in sorted({row["batch_per_device"] for row in predictions}):
        rows = [row for row in predictions if row["batch_per_device"] == batch]
        chosen = min(rows, key=lambda row: row["predicted_milliseconds"])
        fastest = min(rows, key=lambda row: row["measured_milliseconds"])
        loss = chosen["measured_milliseconds"] / fastest["measured_milliseconds"] - 1
        named.append(
            f"at {batch} per GPU {chosen['mesh']} {chosen['parallelism']}, "
            + (f"which is {100 * loss:.1f} % slower than the fastest" if loss else "the fastest")
        )
    return (
        f"Median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %, "
        f"n = {len(errors)}. The plan takes {'; '.join(named)}."
    )


def devices_table(predictions: Sequence[dict]) -> str:
    """Return the fastest mesh and scheme by number of devices and by batches.

    Its milliseconds follow, and how many times as fast as `data` `hybrid` and the fastest are.
    """
    rows = []
    for devices in sorted({row["devices"] for row in predictions}):
        cells = [f"{devices:,}"]
        for batches in dict.fromkeys(row["batches"] for row in predictions):
            found = {
                row["parallelism"]: row
                for row in predictions
                if (row["devices"], row["batches"]) == (devices, batches)
            }
            times = {name: row["predicted_milliseconds"] for name, row in found.items()}
            best = found[min(times, key=times.get)]
            cells += [
                f"{best['mesh']} {best['parallelism']}",
                f"{best['predicted_milliseconds']:.3f}",
                f"{times['data'] / times['hybrid']:.2f}",
                f"{times['data'] / best['predicted_milliseconds']:.2f}",
            ]
        rows.append(cells)
    header = ["GPUs"]
    for batches in dict.fromkeys(row["batches"] for row in predictions):
        header += [batches, "ms", "hybrid", "fastest"]
    return markdown_table(header, rows)
