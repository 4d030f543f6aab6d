"""Make the tables of published steps on several GPUs, beside what is predicted of them.

results/data/predictions/*.json come from benchmarks/history.py. Errors are predicted divided by
measured, minus 1.
"""

from cnn_spmd.papers import published
from cnn_spmd.papers.measured import DATA
from cnn_spmd.report.text import markdown_table
from cnn_spmd.training import runfiles

# Files of papers' curves -> the name of the paper's system.
SYSTEMS = {"optcnn": "OptCNN", "flexflow": "FlexFlow", "tensorflow": "TensorFlow"}
GPUS = (2, 4, 8, 16)


def load(name: str) -> dict:
    """Return the predictions of a paper."""
    return runfiles.read_json(DATA / "predictions" / f"{name}.json")


def percent(predicted: float, measured: float) -> str:
    """Return an error as text."""
    return f"{100 * (predicted / measured - 1):+.1f}"


def one_weird_trick_table() -> str:
    """Return table 1 of One weird trick beside what we and PALEO predict."""
    predictions = {
        (row["devices"], bool(row["dense_microbatch"]), row["schedule"]): row
        for row in load("owt")["predictions"]
    }
    rows = []
    for gpus, dense_batch, _, hours, _ in published.ONE_WEIRD_TRICK:
        variable = dense_batch < 128 * gpus
        measured = published.one_weird_trick_milliseconds(gpus, hours)
        cells = [str(gpus), f"({128 * gpus}, {dense_batch})", f"{measured:.1f}"]
        for schedule in ("by turns", "at once"):
            row = predictions.get((gpus, variable, schedule))
            cells += two_cells(row["predicted_milliseconds"], measured) if row else ["given", ""]
        paleo = "" if variable else percent(published.PALEO_HOURS[gpus], hours)
        rows.append([*cells, paleo])
    header = ["GPUs", "batches", "measured, ms", "by turns, ms", "error, %"]
    header += ["at once, ms", "error, %", "PALEO's error, %"]
    return markdown_table(header, rows)


def two_cells(predicted: float, measured: float) -> list[str]:
    """Return a prediction and its error."""
    return [f"{predicted:.1f}", percent(predicted, measured)]


def curves_table() -> str:
    """Return a row per curve: by number of GPUs measured, predicted and error."""
    rows = []
    for name, system in SYSTEMS.items():
        predictions = load(name)["predictions"]
        for scheme in dict.fromkeys(row["parallelism"] for row in predictions):
            same = {row["devices"]: row for row in predictions if row["parallelism"] == scheme}
            batch = str(same[GPUS[0]]["batch_per_device"])
            rows.append([system, scheme, batch, *(curve_cell(same.get(gpus)) for gpus in GPUS)])
    header = ["system", "scheme", "batch per GPU", *(f"{gpus} GPUs" for gpus in GPUS)]
    return markdown_table(header, rows)


def curve_cell(row: dict | None) -> str:
    """Return milliseconds measured and predicted, and the error; "" for no row."""
    if row is None:
        return ""
    measured, predicted = row["measured_milliseconds"], row["predicted_milliseconds"]
    return f"{measured:.0f}, {predicted:.0f} ({percent(predicted, measured)} %)"


def paleo_errors() -> list[str]:
    """Return PALEO's errors in % if an epoch has the images of ILSVRC-2012."""
    factor = published.IMAGENET_TRAIN / published.PALEO_IMAGES
    return [
        percent(factor * published.PALEO_HOURS[gpus], hours)
        for gpus, dense_batch, _, hours, _ in published.ONE_WEIRD_TRICK
        if dense_batch == 128 * gpus
    ]
