"""Make the table of what a sweep's runs are: network, data, recipe, hardware, command."""

from collections.abc import Callable, Sequence

from cnn_spmd.report import compare, settings
from cnn_spmd.report.settings import Overview
from cnn_spmd.report.text import Table

# Row of the table -> field of the config, or "mesh".
RECIPE = {
    "mesh": "mesh",
    "parallelism": "parallelism",
    "learning rate": "optimizer.learning_rate",
    "batch size": "batch_size",
    "steps": "steps",
    "epochs": "epochs",
    "label smoothing": "label_smoothing",
}


def facts_table(sweep: dict, overview: Overview) -> Table:
    """Return the facts of a sweep; the fields that vary among its runs are left out."""
    runs = sweep["runs"]
    hardware = sweep["hardware"] or {}
    versions = (f"{name} {version}" for name, version in hardware.get("versions", {}).items())
    facts = {
        "network": distinct_texts(runs, network_text),
        "data": distinct_texts(runs, data_text),
        **recipe_facts(runs, overview),
        "hardware": compare.hardware_of(sweep),
        "command": sweep.get("command"),
        "started": sweep.get("started"),
        "versions": ", ".join(versions),
        "commit": hardware.get("commit"),
    }
    return Table(["", ""], [[name, fact] for name, fact in facts.items() if fact])


def recipe_facts(runs: Sequence[dict], overview: Overview) -> dict[str, str]:
    """Return the values of the fields in RECIPE, except what varies."""
    varied = {name for each in overview.settings for name in (each.name, *each.along)}
    facts = {}
    for label, name in RECIPE.items():
        values = [settings.value_of(run, name) for run in runs]
        known = settings.ordered(dict.fromkeys(value for value in values if value))
        if known and name not in varied:
            facts[label] = settings.values_text(known)
    return facts


def distinct_texts(runs: Sequence[dict], text_of: Callable[[dict], str]) -> str:
    """Return the distinct texts that text_of makes of the runs' figures, joined."""
    texts = dict.fromkeys(text_of(run["figures"]) for run in runs if run["figures"])
    return "; ".join(filter(None, texts))


def network_text(figures: dict) -> str:
    """Return the network's name and size."""
    return f"{figures['model']}, {figures['param_count']:,} parameters"


def data_text(figures: dict) -> str:
    """Return the data set's name, and that of the data set that it stands in for."""
    fallback = figures.get("fallback")  # older sweeps lack it
    return figures["dataset"] + (f", which stands in for {fallback}" if fallback else "")
