"""Make results/predictions.md: predicted steps beside measured ones."""

import statistics
from collections.abc import Sequence

import numpy as np

from cnn_spmd.papers.history import history_sections, load_predictions, percent
from cnn_spmd.papers.layout import HEAD, commands, joined
from cnn_spmd.report.text import markdown_table

DEVICES = "devices.svg"


def page() -> str:
    """Return the page of predicted steps beside measured ones."""
    return joined(
        "# Predicted beside measured",
        HEAD,
        """Milliseconds per train step by the model of `cnn_spmd/analysis/cost.py`
        ([planning](../docs/planning.md)). An error is predicted divided by measured, minus 1.""",
        *sweep_predictions(),
        *estimates_section(),
        *devices_section(),
        *history_sections(),
    )


def sweep_predictions() -> list[str]:
    """Return the sections on our own sweeps."""
    ahead = load_predictions("ahead-2xh200")
    schemes = load_predictions("alexnet-224-2xh200-schemes")
    parts = [
        "## Our sweeps of several H200s",
        """AlexNet at 224 pixels in bfloat16, at 32, 128 and 512 images per GPU; each cell has the
        milliseconds of a step, measured and predicted, and the error. `calibrate` measured the
        times of collectives between two H200s. The scheme `two_tower` needs another network.""",
        "### 2 GPUs, predicted before anybody measured them",
        """Commit cdad058 has these predictions; the sweep was run on the same day, later. The card
        then had the step of one GPU of an older sweep. Nothing was changed afterwards.""",
        predictions_table(ahead),
        prediction_errors(ahead),
        """Two terms were missing, and a timeline of the GPUs showed them. A part of the gathers of
        weights is hidden (`sharded_update`). Sums run beside the update of weights that need none:
        under a hybrid scheme, the sum of the convolutions' gradients runs beside the update of the
        dense layers. The model has both terms now, and hides nothing of `fsdp`, which takes one
        layer after the other. Small collectives were measured again. Then `gap`, `hidden_share`
        and `hidden_gathers` were chosen anew: those with the smallest mean error over both sweeps
        of two GPUs, without `fsdp`, `model` and `spatial`. `hidden_share` came out as before. The
        sweep of four GPUs took no part in the choice, but its errors by the older model were
        known.""",
        "### 2 GPUs, by the model of today",
        "The step of one GPU is the sweep's own.",
        predictions_table(schemes),
        prediction_errors(schemes),
        shipped_card_errors(schemes),
        """`model` and `spatial` split the convolutions. Their kernels are then narrower or less
        high, and need copies to join the parts; the model knows neither, and predicts too short a
        step. On two GPUs neither scheme is near the fastest.""",
    ]
    for name, title in (
        ("alexnet-224-2xh200", "### 2 GPUs, an older sweep"),
        ("alexnet-224-4xh200", "### 4 GPUs, not used in the choice"),
    ):
        predictions = load_predictions(name)
        parts += [title, predictions_table(predictions), prediction_errors(predictions)]
    measured = {(row["mesh"], row["parallelism"]) for row in predictions}
    unmeasured = [
        row
        for row in load_predictions("unmeasured")
        if (row["mesh"], row["parallelism"]) not in measured
    ]
    parts += [
        "### 4 GPUs, not measured yet",
        """By the shipped card, with its own step of one GPU. The fastest of all, `dense_2d`, is
        among them.""",
        predictions_table(unmeasured),
        commands(
            "Needs no GPU. It predicts anew what these sections and the next one have, and writes "
            "it to data/predictions/.",
            "python benchmarks/predictions.py",
        ),
    ]
    return parts


def shipped_card_errors(predictions: Sequence[dict]) -> str:
    """Return what the errors of most rows are, with this and with the card's step of one GPU."""
    rows = [row for row in predictions if row["parallelism"] not in ("model", "spatial")]
    by_card = [
        row | dict(predicted_milliseconds=row["by_shipped_card_milliseconds"]) for row in rows
    ]
    return (
        f"Without `model` and `spatial`: {_small(errors_text(rows))}. A plan has the card's step "
        "of one GPU instead, which is from an older sweep, and shorter. With it: "
        f"{_small(errors_text(by_card))}."
    )


def _small(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def estimates_section() -> list[str]:
    """Return the section on steps of one GPU that nobody had to measure."""
    predictions = load_predictions("estimates")
    ahead = load_predictions("ahead")
    parts = [
        "## One GPU, without a measured step",
        f"""A network whose step is not in the card is estimated from the card's rates
        ([planning](../docs/planning.md#a-step-that-nobody-measured)). Three numbers were fitted to
        {sum(row["fitted"] for row in predictions)} rows. The form of the model was settled with all
        rows in view, so that the errors of other networks may be larger. AlexNet 2012 sees 224 of
        the 256 pixels; at 128 images it was measured with 10 classes in a run, and with 1,000 by
        `calibrate`. The vgg_16 at 512 of a run shared its GPU most of the time: its measured step
        is the lower decile.""",
    ]
    for title, fitted in (("Fitted", True), ("Held out", False)):
        rows = [row for row in predictions if row["fitted"] is fitted]
        parts += [f"### {title}", estimates_table(rows), estimate_errors(rows)]
    parts += [
        "### Predicted before anybody measured them",
        """These predictions were committed before the steps were measured. The model had two fitted
        numbers then: `kernel_seconds`, and the width from which on a product runs at the matrix
        rate. Since then `calibrate` measures both, and finds faster kernels than those of
        networks. So three fitted numbers say today how much slower the kernels of networks are.""",
        estimates_table(ahead),
        estimate_errors(ahead),
    ]
    return [*parts, commands("Needs no GPU.", "python benchmarks/estimates.py")]


def devices_section() -> list[str]:
    """Return the section on more GPUs than anybody here has."""
    return [
        "## One to 512 H100s",
        """AlexNet at 224 pixels in bfloat16 on hosts of 8 H100s, each scheme at its best mesh, as
        `--plan` predicts it. Nobody has measured this. Times across hosts are defaults of XLA's
        cost model, the same for 2 hosts and for 64; those up to 8 GPUs were measured between two.
        Below 32 images per GPU the step of one GPU is extrapolated from 32 and 128.""",
        devices_table(load_predictions("devices")),
        """For each batch: the fastest mesh and scheme, and its milliseconds. `hybrid` is one weird
        trick: the column says how many times as fast as `data` it is, at its best mesh. The next
        column says the same of the fastest scheme. Above 1 it pays. Rows that the planner can make
        itself (`--plan_rows`) are left out.""",
        f"![Predicted images/s per GPU, relative to one GPU]({DEVICES})",
    ]


def predictions_table(predictions: Sequence[dict]) -> str:
    """Return measured and predicted milliseconds by mesh, scheme and batch.

    What is not measured has its prediction alone.
    """
    batches = sorted({row["batch_per_device"] for row in predictions})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in predictions:
        predicted = row["predicted_milliseconds"]
        text = f"{predicted:.3f}"
        if measured := row.get("measured_milliseconds"):
            text = f"{measured:.3f}, {text} ({percent(predicted, measured)} %)"
        cells.setdefault((row["mesh"], row["parallelism"]), {})[row["batch_per_device"]] = text
    rows = [[*key, *(own.get(batch, "") for batch in batches)] for key, own in cells.items()]
    return markdown_table(["mesh", "scheme", *(f"{batch} per GPU" for batch in batches)], rows)


def prediction_errors(predictions: Sequence[dict]) -> str:
    """Return a sentence on the errors, and on whether the fastest was named right."""
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
    count = len(predictions)
    return f"{errors_text(predictions)}, n = {count}. The plan takes {'; '.join(named)}."


def errors_text(predictions: Sequence[dict]) -> str:
    """Return the median and the worst error in words."""
    errors = errors_of(predictions)
    return f"Median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %"


def errors_of(predictions: Sequence[dict]) -> list[float]:
    """Return how far predicted steps are from the measured ones, as shares of these."""
    return [
        abs(row["predicted_milliseconds"] / row["measured_milliseconds"] - 1) for row in predictions
    ]


def estimates_table(predictions: Sequence[dict]) -> str:
    """Return measured and estimated milliseconds of steps of one GPU."""
    rows = []
    for row in predictions:
        measured, predicted = row["measured_milliseconds"], row["predicted_milliseconds"]
        error = percent(predicted, measured)
        name = f"{row['experiment']}, {row['image_size']} px"
        batch = str(row["batch_per_device"])
        rows.append([name, row["card"], batch, f"{measured:.3f}", f"{predicted:.3f}", error])
    header = ["experiment", "card", "batch", "measured, ms", "estimated, ms", "error, %"]
    return markdown_table(header, rows)


def estimate_errors(predictions: Sequence[dict]) -> str:
    """Return a sentence on the errors of estimates."""
    within = sum(error <= 0.1 for error in errors_of(predictions))
    most = 100 * float(np.quantile(errors_of(predictions), 0.9))
    return (
        f"{errors_text(predictions)}; {within} of {len(predictions)} are within 10 %, and 9 of 10 "
        f"within {most:.0f} %."
    )


def devices_table(predictions: Sequence[dict]) -> str:
    """Return the fastest mesh and scheme by number of devices and by batches.

    Its milliseconds follow, and how many times as fast as `data` `hybrid` and the fastest are.
    """
    names = list(dict.fromkeys(row["batches"] for row in predictions))
    rows = []
    for devices in sorted({row["devices"] for row in predictions}):
        cells = [f"{devices:,}"]
        for batches in names:
            own = [
                row for row in predictions if (row["devices"], row["batches"]) == (devices, batches)
            ]
            times = {row["parallelism"]: row["predicted_milliseconds"] for row in own}
            best = min(own, key=lambda row: row["predicted_milliseconds"])
            cells += [
                f"{best['mesh']} {best['parallelism']}",
                f"{best['predicted_milliseconds']:.3f}",
                f"{times['data'] / times['hybrid']:.2f}",
                f"{times['data'] / best['predicted_milliseconds']:.2f}",
            ]
        rows.append(cells)
    header = ["GPUs", *(cell for name in names for cell in (name, "ms", "hybrid", "fastest"))]
    return markdown_table(header, rows)
