"""Make results/rates.md: the learning rates that were tried."""

from collections.abc import Callable, Sequence

from cnn_spmd.papers import large_batches
from cnn_spmd.papers.layout import HEAD, about_data, commands, joined
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report.text import markdown_table
from cnn_spmd.training import runfiles


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
        *large_batches.search_section(large_batches.load_search()),
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
        rate = run["config"]["optimizer"]["learning_rate"]
        cells.setdefault((name, rate), []).append(value_of(run))
    rates = sorted({rate for _, rate in cells})
    rows = [
        [name, *("; ".join(cells.get((name, rate), [])) for rate in rates)]
        for name in dict.fromkeys(name for name, _ in cells)
    ]
    return markdown_table(["variant", *(f"rate {rate:g}" for rate in rates)], rows)
