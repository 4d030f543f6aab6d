"""Make the sections of results/predictions.md on steps that papers measured.

The predictions come from benchmarks/history.py. Errors are predicted divided by measured, minus 1.
"""

from cnn_spmd.papers import published
from cnn_spmd.papers.layout import commands
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report.text import markdown_table
from cnn_spmd.training import runfiles

# Files of papers' curves -> the name of the paper's system.
SYSTEMS = {"optcnn": "OptCNN", "flexflow": "FlexFlow", "tensorflow": "TensorFlow"}
GPUS = (2, 4, 8, 16)


def history_sections() -> list[str]:
    """Return the sections on what papers measured on several GPUs."""
    optcnn = ", ".join(f"{error:+}" for error in published.OPTCNN_ERRORS.values())
    return [
        "## One weird trick on K20s",
        """Table 1 of Krizhevsky 2014, on up to eight K20 by PCIe 2.0, predicted from its step on
        one GPU. Batches are (convolutions, dense layers). All other numbers come from data sheets
        and the paper (`cnn_spmd/analysis/cards/k20.json`): 208 GB/s of memory, 6 GB/s by PCIe.
        None was fitted to this table. But the table was known when the two schedules were chosen,
        among several that were worked out, so these rows are no held-out test.""",
        one_weird_trick_table(),
        """By turns is the scheme that the paper measured (its scheme b): one GPU after the other
        sends the dense layers' inputs of its 128 images to all others. At once is our `hybrid`:
        all GPUs send these inputs at the same time. The paper says that a turn can hide behind
        the dense layers' work on the images of the turn before; by turns then costs what at once
        costs. In rows with a dense batch of 128, a GPU updates its dense weights once per 128
        images.""",
        """The measured steps are longer than both. By turns rests on assumptions: a GPU sends a
        copy to each of the others through its own link; only the sums of the convolutions'
        gradients hide, behind the update; and the way between the two groups of four is as fast
        as within a group (it is slower). The authors' later code (cuda-convnet2) sends one copy
        through the host's memory, at a cost that nobody published. So the small error on eight
        GPUs may be luck.""",
        f"""PALEO (Qi et al. 2017) predicts from FLOPs, from 46% of the K20's peak and from 75% of
        8 GB/s; it leaves out the update. The hours that it publishes are those of epochs of
        {published.PALEO_IMAGES:,} images. For ILSVRC-2012's {published.IMAGENET_TRAIN:,} images its
        errors on 1, 2, 4 and 8 GPUs are {", ".join(paleo_errors())} %.""",
        "## AlexNet on P100s",
        """Each cell: measured, predicted (error). The links are those of
        `cnn_spmd/analysis/cards/p100.json`; OptCNN's and FlexFlow's nodes have four GPUs and one
        InfiniBand of 100 Gb/s. Batches are per GPU; the values of OptCNN and FlexFlow are read
        off figures.""",
        curves_table(),
        f"""These systems scale worse than their links allow: what they add to one GPU's step is
        more than twice what the model adds. A data sheet does not describe their software, so such
        a prediction says how fast a step could be. OptCNN reports errors of {optcnn} % of its own
        model on 1, 2, 4, 8 and 16 GPUs, and FlexFlow less than 30 % of its own. Both measure each
        layer on the system that they predict.""",
        commands(
            "Needs no GPU. The files have the terms of each prediction and the calibration.",
            "python benchmarks/history.py",
        ),
    ]


def load_predictions(name: str) -> list[dict]:
    """Return the predictions in a file of results/data/predictions."""
    return runfiles.read_json(DATA / "predictions" / f"{name}.json")["predictions"]


def percent(predicted: float, measured: float) -> str:
    """Return an error as text."""
    return f"{100 * (predicted / measured - 1):+.1f}"


def one_weird_trick_table() -> str:
    """Return table 1 of One weird trick beside what we and PALEO predict."""
    predictions = {
        (row["devices"], bool(row["dense_microbatch"]), row["schedule"]): row
        for row in load_predictions("owt")
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
        predictions = load_predictions(name)
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
