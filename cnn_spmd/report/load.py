"""Load runs and sweeps from their folders, for the report."""

import contextlib
import functools
import pathlib
from collections.abc import Mapping, Sequence

from cnn_spmd.config import MESH_AXES, complete, flat
from cnn_spmd.errors import UserError
from cnn_spmd.report import captions, compare
from cnn_spmd.training import runfiles


def load_sweeps(folders: Sequence[pathlib.Path], notes: list[str]) -> list[dict]:
    """Return the sweeps in `folders`, and the lone runs as further ones.

    A sweep has the form of sweep.json; each run also gets `metrics`, `pictures` and `digest`, that
    of its data. Sweeps and lone runs are called by their folders (distinct_names). notes gets a
    line for each unfinished run and each damaged file, and for accuracies that do not compare. A
    folder that neither is nor holds a sweep or a run is left out, with a line in notes; UserError
    where no other is given.
    """
    found: dict[pathlib.Path, None] = {}
    absent = []
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'does not exist'}")
        paths = sweeps_and_runs(folder)
        found |= dict.fromkeys(paths)
        if not paths:
            said = "holds neither a sweep (sweep.json) nor a run (config.json, summary.json)"
            absent.append(f"{folder}: {said}")
    if absent and not found:
        raise UserError("; ".join(absent))
    notes += (f"{said}; it is left out" for said in absent)
    sweeps, alone = [], {}
    for folder, name in distinct_names(list(found)).items():
        if (folder / "sweep.json").exists():
            sweeps.append(load_sweep(folder, notes) | dict(title=name))
        else:
            alone[folder] = name
    return sweeps + sweeps_of_lone_runs(alone, notes)


def sweeps_and_runs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the sweeps and the lone runs in a folder or below; [folder] where it is one itself."""
    names = ("sweep.json", "config.json", "summary.json")
    if any((folder / name).exists() for name in names):
        return [folder]
    found = {path.parent for name in names for path in folder.rglob(name)}
    return [path for path in sorted(found) if not found.intersection(path.parents)]


def distinct_names(folders: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """Return what each folder is called: the shortest end of its path that no other path has."""
    paths = {folder: folder.resolve().parts for folder in folders}
    names = {}
    for folder, parts in paths.items():
        others = [other for other in paths.values() if other != parts]
        size = 1
        while any(other[-size:] == parts[-size:] for other in others):
            size += 1
        names[folder] = str(pathlib.Path(*parts[-size:]))
    return names


def load_sweep(folder: pathlib.Path, notes: list[str]) -> dict:
    """Return sweep.json, with the runs' configs and the figures that it lacks."""
    path = folder / "sweep.json"
    sweep = runfiles.read_json(path)
    if {"experiment", "devices", "hardware", "runs"} - sweep.keys():
        raise UserError(f"{path}: not a sweep; give the folders of its runs instead")
    runfiles.check_fields(path, sweep)
    empty = dict(mesh=None, settings={}, reason="", command="", seconds=None, figures={})
    runs = []
    for entry in sweep["runs"]:
        run = empty | {name: value for name, value in entry.items() if value is not None}
        if run["status"] in ("running", "completed") and not run["figures"]:
            run |= load_outcome(folder / run["name"], notes)
        config = load_config(folder / run["name"], [])  # refused runs have no folder
        run["config"] = (sweep.get("config") or {}) | config
        if run["config"].get("steps"):  # they decide; the figures have the epochs that were done
            run["config"].pop("epochs", None)
        runs.append(run | load_curves_and_pictures(folder / run["name"], notes))
    if len({compare.split_of([run["config"]]) for run in runs}) > 1:
        notes.append(
            f"{path}: data.validation varies: accuracies of test and of validation images do not "
            "compare"
        )
    elif len(data := compare.by_data([run for run in runs if run["figures"]])) > 1:
        notes.append(f"{path}: the data varies: accuracies do not compare: {', '.join(data)}")
    return sweep | dict(runs=runs)


def sweeps_of_lone_runs(names: Mapping[pathlib.Path, str], notes: list[str]) -> list[dict]:
    """Return runs as sweeps, one for each set of images (compare.by_data); names: by folder."""
    runs = [load_lone_run(folder, name, notes) for folder, name in names.items()]
    return [sweep_of_lone_runs(same) for same in compare.by_data(runs).values()]


def load_lone_run(folder: pathlib.Path, name: str, notes: list[str]) -> dict:
    """Return a run as an entry of sweep.json without settings, and with its `summary`.

    The summary of an unfinished run is {}.
    """
    run = dict(name=name, seconds=None) | load_outcome(folder, notes)
    summary = runfiles.read_json(folder / "summary.json") if run["figures"] else {}
    run["config"] = flat(complete(summary["config"])) if summary else load_config(folder, notes)
    run["command"] = summary.get("command") or ""  # older runs lack it
    run["mesh"] = mesh_of_run(run["figures"].get("mesh"), run["config"])
    return run | dict(summary=summary) | load_curves_and_pictures(folder, notes)


def sweep_of_lone_runs(runs: list[dict]) -> dict:
    """Return runs (load_lone_run) as one sweep; its settings are the fields that differ."""
    fields = [compared_fields(run["config"], run["summary"]) for run in runs]
    differ = differing_fields(fields) - implied_by_experiment(runs, fields)
    for run, own in zip(runs, fields, strict=True):
        run["settings"] = {name: value for name, value in own.items() if name in differ}
    summaries = [run["summary"] for run in runs if run["summary"]]
    where = [{key: summary.get(key) for key in runfiles.HARDWARE} for summary in summaries]
    started = sorted(str(summary["started"]) for summary in summaries)
    return dict(
        title=captions.names_text([run["name"] for run in runs]),
        is_of_lone_runs=True,
        experiment=", ".join(dict.fromkeys(str(summary["experiment"]) for summary in summaries)),
        runs=runs,
        devices=max((summary["devices"] for summary in summaries), default=0),
        started=" to ".join(dict.fromkeys([*started[:1], *started[-1:]])),
        hardware=functools.reduce(runfiles.merge_facts, where) if where else None,
    )


def load_config(folder: pathlib.Path, notes: list[str]) -> dict:
    """Return the flat config of an unfinished run; {} and a note where it is damaged."""
    try:
        return flat(complete(runfiles.read_json(folder / "config.json")))
    except UserError as error:
        notes.append(str(error))
        return {}


def mesh_of_run(mesh: dict | None, config: dict) -> str | None:
    """Return the name of a mesh, such as "4x2"; None where it is not known.

    mesh: size of each mesh axis; None stands for the mesh of a flat config.
    """
    sizes = list((mesh or {axis: config.get(f"mesh.{axis}") for axis in MESH_AXES}).values())
    return compare.mesh_name(sizes) if all(sizes) else None


def compared_fields(config: dict, summary: dict) -> dict:
    """Return the fields that distinguish a run: config, device and digest of the data.

    summary: {} for an unfinished run.
    """
    unused = () if summary.get("dataset") == "synthetic" else ("data.synthetic.",)
    hidden = (*compare.NOT_COMPARED, *unused)
    fields = {field: value for field, value in config.items() if not field.startswith(hidden)}
    for key in ("device_kind", "data_digest"):
        if summary.get(key):
            fields[key] = summary[key]
    return fields


def differing_fields(fields: Sequence[dict]) -> set[str]:
    """Return the fields in which two runs differ; scheme and batch always.

    fields: of each run (compared_fields). A field that a run lacks does not differ from others.
    """
    differ = {"parallelism", "batch_size"}
    for name in {name for own in fields for name in own}:
        values = [own[name] for own in fields if name in own]
        if any(value != values[0] for value in values):
            differ.add(name)
    return differ


def implied_by_experiment(runs: Sequence[dict], fields: Sequence[dict]) -> set[str]:
    """Return the fields that the name of the experiment stands for; none if all runs share it.

    These have one value per experiment, and no run's command sets them. fields: as of
    differing_fields.
    """
    if len({own.get("experiment") for own in fields}) < 2:
        return set()
    by_hand = {name for run in runs for name in set_by_hand(run["command"])}
    kept = {"experiment", "parallelism", "batch_size", "seed", "device_kind", "data_digest"}
    implied = set()
    for name in {name for own in fields for name in own} - by_hand - kept:
        found = {(own.get("experiment"), str(own[name])) for own in fields if name in own}
        if len(found) == len({experiment for experiment, _ in found}):
            implied.add(name)
    return implied


def set_by_hand(command: str) -> list[str]:
    """Return the fields of the config that a command of launch.py sets by flags."""
    flag = "--config."
    words = (word.partition("=")[0] for word in command.split())
    return [word.removeprefix(flag) for word in words if word.startswith(flag)]


def load_outcome(folder: pathlib.Path, notes: list[str]) -> dict:
    """Return status, reason and figures of a run.

    The status is "unfinished" where a file is missing or damaged; notes gets a line.
    """
    try:
        summary = runfiles.read_json(folder / "summary.json")
        if summary.get("status") == "running":
            raise UserError(f"{folder}: summary.json says running")
        figures = runfiles.figures_of(folder)
    except UserError as error:
        reason = str(error).removeprefix(f"{folder}/").removeprefix(f"{folder}: ")
        notes.append(f"{folder}: unfinished: {reason}")
        return dict(status="unfinished", reason=reason, figures={})
    stopped = summary["status"] != "completed"
    reason = f"stopped after step {summary['steps']}" if stopped else ""
    return dict(status=summary["status"], reason=reason, figures=figures)


def load_curves_and_pictures(folder: pathlib.Path, notes: list[str]) -> dict:
    """Return `metrics` and `pictures` of a run, and the `digest` of its data, None if unknown."""
    digest = None
    with contextlib.suppress(UserError):
        digest = runfiles.read_json(folder / "summary.json").get("data_digest")
    return dict(
        metrics=load_metrics(folder, notes), pictures=load_pictures(folder, notes), digest=digest
    )


def load_metrics(folder: pathlib.Path, notes: list[str]) -> list[dict]:
    """Return the lines of metrics.jsonl; a note says how many are damaged."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        rows = runfiles.read_metrics_rows(path)
        lines = runfiles.read_bytes(path).decode(errors="replace").splitlines()
    except UserError as error:
        notes.append(str(error))
        return []
    if cut := len(lines) - len(rows):
        notes.append(f"{path}: {cut} damaged line{'s' * (cut > 1)} left out, {len(rows)} read")
    return rows


def load_pictures(folder: pathlib.Path, notes: list[str]) -> list[tuple[str, bytes, str]]:
    """Return title, PNG and caption of each picture; a note where one is damaged."""
    path = folder / "pictures.json"
    if not path.exists():
        return []
    pictures = []
    try:
        for row in runfiles.check_fields(path, runfiles.read_json(path))["pictures"]:
            if row["file"] != pathlib.Path(row["file"]).name:
                raise UserError(f"{path}: file={row['file']}: expected a name without a folder")
            png = runfiles.read_bytes(folder / row["file"])
            pictures.append((row["title"], png, row["caption"]))
    except ValueError as error:  # UserError, or a name that no file can have
        notes.append(f"{folder}: pictures are left out, draw them again with --pictures ({error})")
        return []
    return pictures
