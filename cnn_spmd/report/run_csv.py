"""Write the runs of sweeps as CSV."""

import csv
import io
from collections.abc import Sequence

from cnn_spmd.config import flat
from cnn_spmd.report import compare


def as_csv(sweeps: Sequence[dict]) -> str:
    """Return one row per run, as CSV: numbers in full, dotted names."""
    rows = [row for sweep in sweeps for row in csv_rows(sweep)]
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def csv_rows(sweep: dict) -> list[dict]:
    """Return the fields of each run of a sweep; speedups where its meshes vary."""
    groups = {compare.group_key(group.runs[0]): group for group in compare.groups_of(sweep["runs"])}
    meshes_vary = len({group.mesh for group in groups.values()}) > 1
    rows = []
    for run in sweep["runs"]:
        row = dict(folder=sweep["title"])
        row |= {name: run[name] for name in ("name", "status", "reason", "seconds", "command")}
        row |= flat(dict(settings=run["settings"]) | plain_figures(run["figures"]))
        rate = run["figures"].get("images_per_second")
        if run["status"] == "completed" and rate and meshes_vary:
            group = groups[compare.group_key(run)]
            if group.base is not None:
                row["speedup"] = rate / group.base.average("images_per_second")
                row["efficiency"] = row["speedup"] / group.devices
        rows.append(row)
    return rows


def plain_figures(figures: dict) -> dict:
    """Return a run's figures without lists: ring bytes by operation, no kernels."""
    plain = dict(figures)
    for row in plain.pop("collectives", None) or ():
        name = f"ring_bytes.{row['operation']}"
        plain[name] = plain.get(name, 0) + row["ring_bytes"]
    profile = dict(plain.get("profile") or {})
    profile.pop("top", None)
    return plain | dict(profile=profile)
