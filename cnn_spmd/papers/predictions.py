"""Make results/predictions.md: predicted steps beside measured ones.

The predictions come from benchmarks/predictions.py, estimates.py and history.py. An error is
predicted divided by measured, minus 1.
"""

import statistics
from collections.abc import Iterable, Sequence

from cnn_spmd.papers import published
from cnn_spmd.papers.layout import filled_in, grid, table
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report.text import markdown_table
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import runfiles

DEVICES = "devices.svg"
# Sweeps by number of GPUs: of all schemes, and older ones of three schemes, on more meshes.
ALL_SCHEMES = {gpus: f"alexnet-224-{gpus}xh200-schemes" for gpus in (2, 4)}
OLDER = {gpus: f"alexnet-224-{gpus}xh200" for gpus in (2, 4)}
MORE = "alexnet-224-4xh200-more"  # model and spatial on four GPUs, and the mesh 2x2
# Sweeps of the variable batch, by number of GPUs.
VARIABLE = {2: "owt-variable-2xh200", 4: "owt-variable-4xh200-one_sum"}
# What was predicted of the sweeps of all schemes before they ran.
AHEAD = {gpus: f"ahead-{gpus}xh200" for gpus in (2, 4)}
AHEAD_MORE = "ahead-4xh200-more"
# The sweep of all schemes on four GPUs, with times of collectives that were measured between four.
BY_FOUR = "by-four"
ERROR_FIELDS = ("predicted_milliseconds", "measured_milliseconds")
IN_OLDER = ("data", "hybrid", "hybrid_alternating")  # the schemes of the older sweeps
# Files of papers' curves -> the name of the paper's system.
SYSTEMS = {"optcnn": "OptCNN", "flexflow": "FlexFlow", "tensorflow": "TensorFlow"}


def page() -> str:
    """Return the page of predicted steps beside measured ones."""
    names = [*AHEAD.values(), AHEAD_MORE, *ALL_SCHEMES.values(), MORE, *OLDER.values()]
    sweeps = {name: distinct(load_predictions(name)) for name in names}
    on_four = [row for name in (ALL_SCHEMES[4], MORE, OLDER[4]) for row in load_predictions(name)]
    measured = {place_of(row) for row in on_four}
    shipped = load_predictions("unmeasured")
    times = {step_of(row) for row in shipped if place_of(row) in measured}
    unmeasured = distinct([row for row in shipped if step_of(row) not in times])
    ahead = sweeps[AHEAD[4]] + sweeps[AHEAD_MORE]
    estimates = load_predictions("estimates")
    fitted = [row for row in estimates if row["fitted"]]
    held_out = [row for row in estimates if not row["fitted"]]
    of_one_gpu = dict(fitted=fitted, held_out=held_out, ahead=load_predictions("ahead"))
    return filled_in(
        "predictions.md",
        sweeps={name: predictions_table(rows) for name, rows in sweeps.items()},
        sweep_errors={name: prediction_errors(rows) for name, rows in sweeps.items()},
        new_errors={name: new_errors(sweeps[name]) for name in AHEAD.values()},
        older_model=errors_by_scheme(load_predictions(f"{AHEAD[4]}-older")),
        ahead_model=errors_by_scheme(sweeps[AHEAD[4]]),
        shipped_card_errors=shipped_card_errors(sweeps[ALL_SCHEMES[2]]),
        fsdp=fsdp_fields(sweeps[ALL_SCHEMES[4]]),
        on_four=dict(count=len(ahead), all=errors_text(ahead), new=new_errors(ahead)),
        by_four=by_four_table(load_predictions(ALL_SCHEMES[4]), load_predictions(BY_FOUR)),
        medians={
            name: errors_text(distinct(load_predictions(name)))
            for name in (ALL_SCHEMES[4], BY_FOUR)
        },
        unmeasured=predictions_table(unmeasured),
        variable=variable_table(load_predictions("variable")),
        fitted=len(fitted),
        estimates={name: estimates_table(rows) for name, rows in of_one_gpu.items()},
        estimate_errors={name: estimate_errors(rows) for name, rows in of_one_gpu.items()},
        devices=devices_table(load_predictions("devices")),
        one_weird_trick=one_weird_trick_table(),
        published=published,
        paleo_errors=", ".join(paleo_errors()),
        curves=curves_table(),
        optcnn_errors=", ".join(f"{error:+}" for error in published.OPTCNN_ERRORS.values()),
    )


def load_predictions(name: str) -> list[dict]:
    """Return the predictions in a file of results/data/predictions."""
    return runfiles.read_json(DATA / "predictions" / f"{name}.json")["predictions"]


def percent(predicted: float, measured: float) -> str:
    """Return an error as text."""
    return f"{100 * (predicted / measured - 1):+.1f}"


def milliseconds(row: dict, digits: int) -> str:
    """Return milliseconds, measured and predicted, and the error; or predicted alone."""
    predicted, measured = row["predicted_milliseconds"], row.get("measured_milliseconds")
    if measured is None:
        return f"{predicted:.{digits}f}"
    return f"{measured:.{digits}f}, {predicted:.{digits}f} ({percent(predicted, measured)} %)"


# ---- Our sweeps


def place_of(row: dict) -> tuple[str, str]:
    """Return the mesh and the scheme of a prediction."""
    return row["mesh"], row["parallelism"]


def step_of(row: dict) -> tuple[int, float]:
    """Return what only predictions of one program share: the batch and the milliseconds."""
    return row["batch_per_device"], row["predicted_milliseconds"]


def distinct(predictions: Iterable[dict]) -> list[dict]:
    """Return the predictions in the table's order, those of one program once."""
    order = list(TABLE)
    first = {}
    for row in sorted(predictions, key=lambda row: (order.index(row["parallelism"]), row["mesh"])):
        first.setdefault(step_of(row), row)
    return list(first.values())


def predictions_table(predictions: Sequence[dict]) -> str:
    """Return measured and predicted milliseconds by mesh, scheme and batch."""
    cells = {(*place_of(row), row["batch_per_device"]): milliseconds(row, 3) for row in predictions}
    return grid(["mesh", "scheme"], "{} per GPU", cells)


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
    return (
        f"Median error {errors_text(predictions)}, n = {len(predictions)}. Predicted as the "
        f"fastest of these rows: {'; '.join(named)}."
    )


def variable_table(predictions: Sequence[dict]) -> str:
    """Return measured and predicted milliseconds by mesh and scheme."""
    return table(
        [
            {
                "mesh": row["mesh"],
                "scheme": row["parallelism"],
                "measured, ms": f"{row['measured_milliseconds']:.3f}",
                "predicted, ms": f"{row['predicted_milliseconds']:.3f}",
                "error, %": percent(*(row[name] for name in ERROR_FIELDS)),
            }
            for row in predictions
        ]
    )


def new_errors(predictions: Sequence[dict]) -> str:
    """Return the errors of the schemes that no older sweep had measured."""
    rows = [row for row in predictions if row["parallelism"] not in IN_OLDER]
    return f"median error {errors_text(rows)}, n = {len(rows)}"


def errors_by_scheme(rows: Sequence[dict]) -> dict[str, str]:
    """Return the errors of all predictions in words, and the worst by scheme in %."""
    errors = {"all": errors_text(rows)}
    for scheme in {row["parallelism"] for row in rows}:
        own = errors_of([row for row in rows if row["parallelism"] == scheme])
        errors[scheme] = f"{100 * max(own):.1f}"
    return errors


def fsdp_fields(predictions: Sequence[dict]) -> dict[str, object]:
    """Return the errors without fsdp, and its communication in ms, measured and predicted."""
    rows = [row for row in predictions if row["parallelism"] == "fsdp"]
    runs = runfiles.read_json(DATA / "sweeps" / f"{ALL_SCHEMES[4]}.json")["runs"]
    return dict(
        errors_without=errors_text([row for row in predictions if row not in rows]),
        predicted=statistics.mean(row["terms"]["communication"] for row in rows),
        measured=statistics.mean(
            run["figures"]["profile"]["communication_milliseconds"]
            for run in runs
            if run["figures"]["parallelism"] == "fsdp"
        ),
    )


def by_four_table(by_two: Sequence[dict], by_four: Sequence[dict]) -> str:
    """Return the errors by scheme, with collectives measured between two GPUs and between four."""
    cells = {}
    for gpus, predictions in ((2, by_two), (4, by_four)):
        for row in distinct(predictions):
            own = [each for each in predictions if place_of(each) == place_of(row)]
            own.sort(key=lambda each: each["batch_per_device"])
            errors = (percent(*map(each.get, ERROR_FIELDS)) for each in own)
            cells[*place_of(row), gpus] = ", ".join(errors)
    return grid(["mesh", "scheme"], "times between {} GPUs: error in %, at 32, 128, 512", cells)


def shipped_card_errors(predictions: Sequence[dict]) -> str:
    """Return the errors of most rows, with this and with the card's step of one GPU."""
    rows = [row for row in predictions if row["parallelism"] not in ("model", "spatial")]
    by_card = [
        row | dict(predicted_milliseconds=row["by_shipped_card_milliseconds"]) for row in rows
    ]
    return (
        f"Without `model` and `spatial`: median error {errors_text(rows)}. A plan has the card's "
        "step of one GPU instead, which is from an older sweep, and shorter. With it: median error "
        f"{errors_text(by_card)}."
    )


def errors_text(predictions: Sequence[dict]) -> str:
    """Return the median and the worst error in words."""
    errors = errors_of(predictions)
    return f"{100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %"


def errors_of(predictions: Sequence[dict]) -> list[float]:
    """Return how far predicted steps are from the measured ones, as shares of these."""
    return [
        abs(row["predicted_milliseconds"] / row["measured_milliseconds"] - 1) for row in predictions
    ]


# ---- Steps of one GPU that nobody had to measure


def estimates_table(predictions: Sequence[dict]) -> str:
    """Return measured and estimated milliseconds of steps of one GPU."""
    return table(
        [
            {
                "experiment": f"{row['experiment']}, {row['image_size']} px",
                "card": row["card"],
                "batch": str(row["batch_per_device"]),
                "measured, ms": f"{row['measured_milliseconds']:.3f}",
                "estimated, ms": f"{row['predicted_milliseconds']:.3f}",
                "error, %": percent(row["predicted_milliseconds"], row["measured_milliseconds"]),
            }
            for row in predictions
        ]
    )


def estimate_errors(predictions: Sequence[dict]) -> str:
    """Return a sentence on the errors of estimates."""
    errors = errors_of(predictions)
    within = {limit: sum(100 * error <= limit for error in errors) for limit in (10, 12)}
    return (
        f"Median error {errors_text(predictions)}; {within[10]} of {len(errors)} are within 10 %, "
        f"and {within[12]} within 12 %."
    )


# ---- More GPUs than anybody here has


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


# ---- Steps that papers measured


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
            if row := predictions.get((gpus, variable, schedule)):
                predicted = row["predicted_milliseconds"]
                cells += [f"{predicted:.1f}", percent(predicted, measured)]
            else:
                cells += ["given", ""]
        paleo = "" if variable else percent(published.PALEO_HOURS[gpus], hours)
        rows.append([*cells, paleo])
    header = ["GPUs", "batches", "measured, ms", "by turns, ms", "error, %"]
    header += ["at once, ms", "error, %", "PALEO's error, %"]
    return markdown_table(header, rows)


def curves_table() -> str:
    """Return the papers' curves, measured and predicted, by number of GPUs."""
    cells = {}
    for name, system in SYSTEMS.items():
        for row in load_predictions(name):
            batch = str(row["batch_per_device"])
            cells[system, row["parallelism"], batch, row["devices"]] = milliseconds(row, 0)
    return grid(["system", "scheme", "batch per GPU"], "{} GPUs", cells)


def paleo_errors() -> list[str]:
    """Return PALEO's errors in % if an epoch has the images of ILSVRC-2012."""
    factor = published.IMAGENET_TRAIN / published.PALEO_IMAGES
    return [
        percent(factor * published.PALEO_HOURS[gpus], hours)
        for gpus, dense_batch, _, hours, _ in published.ONE_WEIRD_TRICK
        if dense_batch == 128 * gpus
    ]
