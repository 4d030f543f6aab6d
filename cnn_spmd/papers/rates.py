"""Make results/rates.md: the learning rates that were tried."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from cnn_spmd.papers import large_batches
from cnn_spmd.papers.layout import HEAD, about_data, commands, joined
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report.text import markdown_table
from cnn_spmd.training import runfiles

# Batch and learning rate -> errors in %, of one network and rule; None where a run diverged.
Search = dict[int, dict[float, list[float | None]]]


def page() -> str:
    """Return the page on the learning rates that were tried."""
    claims, deeper = (
        runfiles.read_json(DATA / "rates" / f"{name}.json")["runs"]
        for name in ("claims_2012_relu_tanh", "deeper_cifar")
    )
    sweep = "python launch.py --config experiments/"
    return joined(
        "# Learning rates that were tried",
        HEAD,
        about_data(),
        "## ReLU and tanh",
        """Epochs to 25% training error on CIFAR-10, one seed on one H100; -: not within 20 epochs.
        relu was then run at 0.02, and tanh at 0.03, between the two rates that tie.""",
        rates_table(claims, "claims_2012_", epochs_text),
        commands(
            "The same for :tanh.",
            f"{sweep}claims_2012_cifar.py:relu --config.epochs=20"
            " --sweep optimizer.learning_rate=.005,.01,.02,.05,.1",
        ),
        "## Networks of different depth",
        """Test accuracy in % on CIFAR-10, one H200; one value per seed. All networks were then run
        at 0.25, the best rate from one_convolution on.""",
        rates_table(deeper, "deeper_", lambda run: f"{100 * run['eval']['accuracy']:.2f}"),
        commands(
            "The same for the other networks.",
            f"{sweep}deeper_cifar.py:vgg_16 --config.seed=9"
            " --sweep optimizer.learning_rate=.05,.1,.25",
        ),
        *search_section(load_search()),
    )


def epochs_text(run: dict) -> str:
    """Return the epochs to 25% training error; "-" where it was not reached."""
    epochs = run["epochs_to_error"]
    return "-" if epochs is None else f"{epochs:.1f}"


def rates_table(runs: Sequence[dict], prefix: str, value_of: Callable[[dict], str]) -> str:
    """Return a value by experiment (without its prefix) and learning rate."""
    cells: dict[tuple[str, float], list[str]] = {}
    for run in runs:
        name = run["experiment"].removeprefix(prefix)
        cells.setdefault((name, large_batches.rate_of(run)), []).append(value_of(run))
    rates = sorted({rate for _, rate in cells})
    rows = [
        [name, *("; ".join(cells.get((name, rate), [])) for rate in rates)]
        for name in dict.fromkeys(name for name, _ in cells)
    ]
    return markdown_table(["variant", *(f"rate {rate:g}" for rate in rates)], rows)


# ---- Large batches


def load_search() -> list[dict]:
    """Return the runs of the search; [] where it is not made."""
    path = DATA / "rates" / "large_batch_cifar.json"
    return runfiles.read_json(path)["runs"] if path.exists() else []


def by_rate(runs: Iterable[dict]) -> dict[str, Search]:
    """Return the errors of a search by experiment, batch and learning rate."""
    found: dict[str, Search] = {}
    for run in runs:
        errors = found.setdefault(run["experiment"], {}).setdefault(run["batch_size"], {})
        errors.setdefault(large_batches.rate_of(run), []).append(large_batches.error_of(run))
    return found


def best_rate(errors: dict[float, list[float | None]]) -> float | None:
    """Return the rate of the lowest mean error, of rates with which no run diverged."""
    means = {rate: statistics.mean(own) for rate, own in errors.items() if None not in own}
    return min(means, key=means.get, default=None)


def best_rates(runs: Iterable[dict]) -> large_batches.BestRates:
    """Return the best rate of each experiment and batch of a search."""
    return {
        (experiment, batch): best_rate(errors)
        for experiment, batches in by_rate(runs).items()
        for batch, errors in batches.items()
    }


def search_section(runs: Sequence[dict]) -> list[str]:
    """Return the section on the search; [] without runs."""
    if not runs:
        return []
    held_out = max(run["config"]["data"]["validation"] for run in runs)
    epochs, seeds = max(run["epochs"] for run in runs), len({run["seed"] for run in runs})
    machines = large_batches.machines_of(runs)
    parts = [
        "## Large batches",
        f"""Error in % on {held_out:,} images of CIFAR-10 that are held out of training, after
        {epochs:g} epochs on {machines}; n is {seeds}. The rate is that of batch 128: at batch B it
        is multiplied by B / 128 for linear, and by (B / 128)^0.75 for lars and larc. The best of
        each row is bold. Diverged: the loss or the weights became infinite or NaN.
        [batches.md](batches.md) has the runs at the best rates.""",
    ]
    lines = []
    for experiment, batches in sorted(by_rate(runs).items()):
        parts += [f"### {large_batches.names_of(experiment)[1]}", search_table(batches)]
        variant = experiment.removeprefix(large_batches.CIFAR)
        sizes = ",".join(map(str, sorted(batches)))
        rates = ",".join(f"{rate:g}" for rate in rates_of(batches))
        lines.append(
            f"{large_batches.LAUNCH}:{variant} --config.epochs={epochs:g}"
            f" --config.data.validation={held_out}"
            f" --sweep batch_size={sizes} --sweep optimizer.learning_rate={rates}"
        )
    return [*parts, commands("A sweep per network and rule.", *lines)]


def rates_of(batches: Search) -> list[float]:
    """Return the rates that any batch was tried with."""
    return sorted({rate for errors in batches.values() for rate in errors})


def search_table(batches: Search) -> str:
    """Return errors by batch and learning rate, the best of each row bold."""
    rates, rows = rates_of(batches), []
    for batch, errors in sorted(batches.items()):
        best = best_rate(errors)
        cells = {rate: large_batches.errors_text(own) for rate, own in errors.items()}
        if best is not None:
            cells[best] = f"**{cells[best]}**"
        found = (cells.get(rate, "") for rate in rates)
        rows.append([f"{batch:,}", *found, best_text(best, sorted(errors))])
    return markdown_table(["batch", *(f"rate {rate:g}" for rate in rates), "best rate"], rows)


def best_text(best: float | None, tried: Sequence[float]) -> str:
    """Return the best rate, and whether it is the smallest or largest tried."""
    if best is None:
        return "none"
    edges = {tried[0]: ", the smallest tried", tried[-1]: ", the largest tried"}
    return f"{best:g}{edges.get(best, '')}"
