"""Make the table of what a sweep's runs are: network, data, recipe, hardware, command."""

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
    """Return the facts of a sweep; the fields that vary among its runs are left out.

    Those of lone runs stand in a table of their own (best_runs.differences).
    """
    begun = [run for run in sweep["runs"] if run["figures"]]
    networks = dict.fromkeys(
        f"{run['figures']['model']}, {run['figures']['param_count']:,} parameters" for run in begun
    )
    experiment = sweep["experiment"]
    if overview.is_of_lone_runs:
        networks = networks if len(networks) == 1 else []
        experiment = "" if ", " in experiment else experiment
    hardware = sweep["hardware"] or {}
    versions = (f"{name} {version}" for name, version in hardware.get("versions", {}).items())
    facts = {
        "experiment": experiment,
        "network": "; ".join(networks),
        "data": "; ".join(dict.fromkeys(map(data_text, begun))),
        **recipe_facts(sweep["runs"], overview),
        "hardware": compare.hardware_of(sweep),
        "command": sweep.get("command"),
        "started": sweep.get("started"),
        "versions": ", ".join(versions),
        "commit": hardware.get("commit"),
    }
    return Table(["", ""], [[name, fact] for name, fact in facts.items() if fact])


def recipe_facts(runs: list[dict], overview: Overview) -> dict[str, str]:
    """Return the values of the fields in RECIPE, except what varies.

    A number that follows from what a sweep varies has its range.
    """
    varied = {name for each in overview.settings for name in (each.name, *each.along)}
    facts = {}
    for label, name in RECIPE.items():
        values = dict.fromkeys(settings.value_of(run, name) for run in runs)
        known = settings.ordered([value for value in values if value not in (None, "")])
        if len(known) == 1 and known[0]:
            facts[label] = compare.value_text(known[0])
        elif len(known) > 1 and name not in varied and not overview.is_of_lone_runs:
            first, *_, last = map(compare.value_text, known)
            facts[label] = f"{first} to {last}" if all(map(settings.is_number, known)) else ""
    return facts


def data_text(run: dict) -> str:
    """Return a run's data set, what it stands in for, and how many images were evaluated."""
    figures = run["figures"]
    fallback = figures.get("fallback")  # older sweeps lack it
    text = compare.data_name(run) + (f", which stands in for {fallback}" if fallback else "")
    count, split = (figures.get("eval") or {}).get("examples"), compare.split_of([run["config"]])
    return text + (f", {count:,} {split} images" if count else "")
