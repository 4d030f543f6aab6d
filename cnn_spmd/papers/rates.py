"""Make results/rates.md: the learning rates that were tried."""

import collections
import statistics
from collections.abc import Callable, Iterable, Sequence

from cnn_spmd.papers import large_batches
from cnn_spmd.papers.layout import commands, filled_in, grid, joined, table
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.training import runfiles

AT_EDGE = "(smallest) and (largest) are edges of what was tried at this batch."
# Learning rate -> errors in %, of one network, rule and batch; None where a run diverged.
Tried = dict[float, list[float | None]]


def page() -> str:
    """Return the page on the learning rates that were tried."""
    claims, deeper = (
        runfiles.read_json(DATA / "rates" / f"{name}.json")["runs"]
        for name in ("claims_2012_relu_tanh", "deeper_cifar")
    )
    return filled_in(
        "rates.md",
        relu_tanh=rates_table(claims, "claims_2012_", epochs_text),
        deeper=rates_table(deeper, "deeper_", lambda run: f"{100 * run['eval']['accuracy']:.2f}"),
        **search_fields(load_search()),
    )


def epochs_text(run: dict) -> str:
    """Return the epochs to 25% training error; "-" where it was not reached."""
    epochs = run["epochs_to_error"]
    return "-" if epochs is None else f"{epochs:.1f}"


def rates_table(runs: Sequence[dict], prefix: str, value_of: Callable[[dict], str]) -> str:
    """Return a value by experiment (without its prefix) and learning rate."""
    values = collections.defaultdict(list)
    for run in runs:
        name = run["experiment"].removeprefix(prefix)
        values[name, large_batches.rate_of(run)].append(value_of(run))
    cells = {key: "; ".join(own) for key, own in values.items()}
    return grid(["variant"], "rate {:g}", cells)


# ---- Large batches


def load_search() -> list[dict]:
    """Return the runs of the search for the rates of large batches."""
    return runfiles.read_json(DATA / "rates" / "large_batch_cifar.json")["runs"]


def load_other_rates() -> list[dict]:
    """Return whole runs at a rate that was the best of the search, but not of whole runs."""
    return runfiles.read_json(DATA / "rates" / "large_batch_cifar_other_rates.json")["runs"]


def by_rate(runs: Iterable[dict]) -> dict[tuple[str, int], Tried]:
    """Return the errors of a search by experiment and batch, then by learning rate."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in runs:
        errors = found[run["experiment"], run["batch_size"]]
        errors[large_batches.rate_of(run)].append(large_batches.error_of(run))
    return found


def best_of(errors: Tried) -> list[float]:
    """Return the rate of the lowest mean error, of rates with which no run diverged.

    More than one where they tie, none where all diverged.
    """
    means = {rate: statistics.mean(own) for rate, own in errors.items() if None not in own}
    return sorted(rate for rate, mean in means.items() if mean == min(means.values()))


def best_rates(runs: Iterable[dict]) -> large_batches.BestRates:
    """Return the best rates of each experiment and batch of a search."""
    return {key: best_of(errors) for key, errors in by_rate(runs).items()}


def at_edge(rate: float, errors: Tried) -> str:
    """Return " (smallest)" or " (largest)" for such a one of the rates tried, "" for another."""
    sides = {min(errors): " (smallest)", max(errors): " (largest)"}
    return sides.get(rate, "")


def edges(runs: Iterable[dict]) -> large_batches.Edges:
    """Return each experiment and batch of a search that has a best rate at the edge."""
    found = by_rate(runs).items()
    return {key for key, tried in found if {min(tried), max(tried)} & {*best_of(tried)}}


def search_fields(runs: Sequence[dict]) -> dict[str, object]:
    """Return what the page's template names of the search."""
    held_out = max(run["config"]["data"]["validation"] for run in runs)
    epochs = max(run["epochs"] for run in runs)
    parts, lines = [], []
    found = sorted(by_rate(runs).items())
    for experiment in dict.fromkeys(experiment for (experiment, _), _ in found):
        batches = {batch: errors for (name, batch), errors in found if name == experiment}
        parts += [f"### {large_batches.names_of(experiment)[1]}", search_table(batches)]
        variant = experiment.removeprefix(large_batches.CIFAR)
        sizes = ",".join(map(str, batches))
        rates = ",".join(map(large_batches.rate_text, rates_of(batches)))
        lines.append(
            f"python launch.py --config experiments/large_batch_cifar.py:{variant}"
            f" --config.epochs={epochs:g} --config.data.validation={held_out}"
            f" --sweep batch_size={sizes} --sweep optimizer.learning_rate={rates}"
        )
    return dict(
        held_out=held_out,
        epochs=epochs,
        machines=large_batches.machines_of(runs),
        n=len({run["seed"] for run in runs}),
        at_edge=AT_EDGE if edges(runs) else "",
        searches=joined(*parts),
        commands=commands("A sweep per network and rule.", *lines),
    )


def rates_of(batches: dict[int, Tried]) -> list[float]:
    """Return the rates that any batch was tried with."""
    return sorted({rate for errors in batches.values() for rate in errors})


def search_table(batches: dict[int, Tried]) -> str:
    """Return errors by batch and learning rate, the best of each row bold."""
    rows = []
    for batch, errors in batches.items():
        best = best_of(errors)
        row = {"batch / rate": f"{batch:,}"}
        for rate in rates_of(batches):
            cell = large_batches.errors_text(errors[rate]) if rate in errors else ""
            row[large_batches.rate_text(rate)] = f"**{cell}**" if rate in best else cell
        found = " or ".join(
            f"{large_batches.rate_text(rate)}{at_edge(rate, errors)}" for rate in best
        )
        rows.append(row | {"best": found or "none"})
    return table(rows)
