"""The report's charts: which there are, what they show, and captions that say hardware, n and what was left out."""

from cnn_spmd.papers import published as papers
from cnn_spmd.report import plots
from cnn_spmd.report.compare import average, hardware_of, speedups, values

# Part of a step -> colour, hatch.
SPLIT = {
    "computing": ("#56B4E9", ""),
    "computing + communicating": ("#0072B2", "////"),
    "communicating, exposed": ("#D55E00", "xxxx"),
    "idle": ("#ffffff", ""),
    "communicating (model)": ("#E69F00", "\\\\\\\\"),
    "rest of the step (model)": ("#cfe8f7", ""),
    "step, not split": ("#bbbbbb", ""),
}
OPERATIONS = {
    "all-reduce": ("#0072B2", ""),
    "all-gather": ("#E69F00", "////"),
    "reduce-scatter": ("#009E73", "xxxx"),
    "all-to-all": ("#CC79A7", "...."),
    "collective-permute": ("#56B4E9", "\\\\\\\\"),
}
HELD = {"parameters": ("#0072B2", ""), "optimizer": ("#E69F00", "////")}


def charts(sweep: dict, groups: list[dict]) -> list[tuple[str, list[str], str]]:
    """Title, SVG pictures and caption of each chart that there are figures for."""
    panels = {}
    for group in groups:
        panels.setdefault(group["panel"], []).append(group)
    scaled = {panel: members for panel, members in panels.items() if any(map(speedups, members))}
    alone = "; ".join(panel for panel in panels if panel not in scaled)
    alone = (
        f" There is no one-device run, so no ideal and no speedup, with: {alone}." if alone else ""
    )
    hardware, missing = hardware_of(sweep), left_out(sweep["runs"])
    timed = f"{hardware}; {count(groups)}. Left out: first calls (warm-up), compilation, evaluation, checkpoints{missing}."
    compiled = f"From the step as compiled for {hardware}; {count(groups, calls=False)}. Left out: evaluation{missing}."
    drawn = []
    with plots.style():
        if groups:
            drawn.append(
                (
                    "Throughput",
                    [plots.throughput(members) for members in panels.values()],
                    "Images a second over the steady calls; error bars reach from the 10th to the 90th percentile of the "
                    f"step time. Dashed: ideal, the fastest one-device run times the devices.{alone} {timed}",
                )
            )
        if scaled:
            published = papers_for(sweep, groups)
            drawn.append(
                (
                    "Speedup",
                    [plots.speedup(members, published) for members in scaled.values()],
                    "Throughput relative to the one-device run with the same settings, both scales logarithmic; a line "
                    f"joins each scheme's fastest meshes.{alone} {papers_caption(published)} {timed}",
                )
            )
        for title, bars, caption in BARS if groups else ():
            choose = {step_bars: with_a_speed, moved_bars: with_a_report}.get(bars, list)
            pictures = [
                plots.bars(shown, *bars(shown)) for shown in map(choose, panels.values()) if shown
            ]
            silent = [
                run["name"]
                for group in groups
                if group not in choose(groups)
                for run in group["runs"]
            ]
            silent = f" Without a report on the program: {', '.join(silent)}." if silent else ""
            drawn.append(
                (
                    title,
                    pictures,
                    f"{caption} {compiled}{silent}"
                    if caption
                    else f"{split_caption(with_a_speed(groups))} {timed}",
                )
            )
        if any(run["metrics"] for run in sweep["runs"]):
            none = [run["name"] for run in sweep["runs"] if not run["metrics"]]
            drawn.append(
                (
                    "Loss and accuracy",
                    plots.curves(sweep["runs"]),
                    "Lines: training, the mean over each call; markers: test. From metrics.jsonl, a curve a run (n = 1), "
                    f"cut short or not. {hardware}. Left out, having no metrics: {', '.join(none) or 'no run'}.",
                )
            )
    return drawn


def with_a_speed(groups: list[dict]) -> list[dict]:
    return [group for group in groups if average(group, "images_per_second")]


def with_a_report(groups: list[dict]) -> list[dict]:
    return [group for group in groups if group["runs"][0]["figures"]["collectives"] is not None]


# ---- Words


def count(groups: list[dict], calls: bool = True) -> str:
    """How many runs, and steady calls, a point stands for."""

    def span(numbers: set[int]) -> str:
        return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"

    if not groups:
        return "n = 0"
    steady = {n for group in groups for n in values(group, "steady_calls")} if calls else set()
    sizes = {len(group["runs"]) for group in groups}
    return (
        f"n = {span(sizes)} run{'s' * (sizes != {1})} (seeds) a point{', averaged' * (max(sizes) > 1)}"
        + (f", each over {span(steady)} steady call{'s' * (steady != {1})}" if steady else "")
    )


def left_out(runs: list[dict]) -> str:
    """The runs that did not complete, by status, and those without a speed; "" where there are none. The table of all runs
    has the reasons."""
    names = {}
    for run in runs:
        if run["status"] != "completed":
            names.setdefault(run["status"], []).append(run["name"])
        elif not run["figures"].get("images_per_second"):
            names.setdefault("that had no step left to time", []).append(run["name"])
    return "".join(f"; runs {status}: {', '.join(some)}" for status, some in names.items())


def papers_for(sweep: dict, groups: list[dict]) -> dict[str, dict]:
    """Letter -> published curve, where ours compare with them: AlexNet, on devices of their own."""
    models = {model for group in groups for model in values(group, "model")}
    if (sweep["hardware"] or {}).get("device_kind") == "cpu" or not all(
        model.startswith("alexnet") for model in models
    ):
        return {}
    return dict(zip("abcdefghij", papers.CURVES, strict=False))


def papers_caption(published: dict[str, dict]) -> str:
    if not published:
        return "Published curves are left out: simulated devices, or another network than AlexNet, do not compare with them."
    sources = {}
    for letter, curve in published.items():
        source = (curve["paper"], curve["hardware"], f"batch {curve['batch']}")
        sources.setdefault(source, []).append(f"{letter} {curve['scheme']}")
    texts = [f"{', '.join(letters)} ({', '.join(source)})" for source, letters in sources.items()]
    return (
        "Grey: published, each relative to one GPU of its own, on 224x224 images, the batch growing with the GPUs: "
        f"{'; '.join(texts)}."
    )


def split_caption(groups: list[dict]) -> str:
    kinds = {}
    for group in groups:
        kinds.setdefault(split_of(group)[0], []).append(group)
    steps = sorted({int(n) for group in groups for n in values(group, "profile", "steps")})
    texts = {
        "profile": f"Split as measured by a profile of {' or '.join(map(str, steps))} steps, mean over the devices; the "
        "tick is the median step without the profiler.",
        "model": "Marked (model), not measured: communication is the ring bytes at the link's datasheet speed (NVLink, "
        "450 GB/s each way), and the rest is what is left of the measured median step.",
        "": "Grey bars are not split: there is no profile, and no known speed of a link between the devices.",
    }
    return " ".join(text for kind, text in texts.items() if kind in kinds)


# ---- Bars: unit, parts (name -> colour, hatch and a length for each group), and the ticks on them (name, places)


def split_of(group: dict) -> tuple[str, dict[str, float]]:
    """How a group's step was split ("profile", "model" or "": not at all), and its parts in ms."""
    part = {
        name: average(group, "profile", f"{name}_milliseconds")
        for name in ("compute", "communication", "exposed", "idle")
    }
    if None not in part.values():
        hidden = part["communication"] - part["exposed"]
        return "profile", dict(
            zip(
                SPLIT,
                (part["compute"] - hidden, hidden, part["exposed"], part["idle"]),
                strict=False,
            )
        )
    figures, step = group["runs"][0]["figures"], average(group, "step_milliseconds", "median")
    link, ring = papers.LINKS.get(figures["device_kind"]), average(group, "ring_bytes")
    if link is None or ring is None or figures.get("processes", 1) > 1:
        return "", {"step, not split": step}
    communication = min(step, 1e3 * ring / link)
    return "model", {
        "communicating (model)": communication,
        "rest of the step (model)": step - communication,
    }


def step_bars(groups: list[dict]) -> tuple:
    splits = [split_of(group) for group in groups]
    parts = {
        part: (*look, [max(0.0, split.get(part, 0.0)) for _, split in splits])
        for part, look in SPLIT.items()
    }
    medians = [
        average(group, "step_milliseconds", "median") if kind == "profile" else None
        for group, (kind, _) in zip(groups, splits, strict=True)
    ]
    return "ms a step", parts, ("without profiler", medians)


def moved_bars(groups: list[dict]) -> tuple:
    rows = [group["runs"][0]["figures"]["collectives"] for group in groups]
    looks = OPERATIONS | {
        row["operation"]: ("#ffffff", "++++")
        for some in rows
        for row in some
        if row["operation"] not in OPERATIONS
    }
    parts = {
        name: (
            *look,
            [
                sum(row["ring_bytes"] for row in some if row["operation"] == name) / 1e6
                for some in rows
            ],
        )
        for name, look in looks.items()
    }
    return (
        "MB sent by a device in a step",
        parts,
        ("closed form", megabytes(groups, "closed_form_ring_bytes")),
    )


def held_bars(groups: list[dict]) -> tuple:
    parts = {
        name: (*look, [size or 0.0 for size in megabytes(groups, "bytes_per_device", name)])
        for name, look in HELD.items()
    }
    return "MB on a device", parts, ("peak", megabytes(groups, "peak_bytes"))


def megabytes(groups: list[dict], *path: str) -> list[float | None]:
    return [None if (size := average(group, *path)) is None else size / 1e6 for group in groups]


BARS = (
    ("Step time", step_bars, ""),
    (
        "Bytes moved by collectives",
        moved_bars,
        "What a step's collectives send from each device if each runs as a ring, in MB "
        "of 1e6 bytes; the tick is the closed form (Gholami et al. 2018).",
    ),
    (
        "Memory a device",
        held_bars,
        "Parameters and optimizer state, in MB of 1e6 bytes; the tick is XLA's figure for the peak "
        "of the compiled call, with activations and data, where it gives one.",
    ),
)
