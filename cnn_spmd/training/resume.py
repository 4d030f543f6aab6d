"""Begin or resume a run from what its folder holds."""

import pathlib
import secrets

import jax
from absl import logging

from cnn_spmd import config as configs
from cnn_spmd.errors import UserError
from cnn_spmd.training import provenance, runfiles
from cnn_spmd.training.checkpoint import Checkpoints
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.step import TrainState
from cnn_spmd.training.terminal import say
from cnn_spmd.training.workdir import has_checkpoint, write_run_file


def is_complete(setup: Setup, workdir: pathlib.Path, old_summary: dict) -> bool:
    """Return, and say, whether the run has no step left to do and has been evaluated.

    If an older checkpoint is there and that of the last step is not, steps are left to do.
    """
    steps = setup.config.steps
    evaluation = old_summary.get("eval")
    accuracy = evaluation.get("accuracy") if isinstance(evaluation, dict) else None
    done = old_summary.get("status") == "completed" and old_summary.get("steps") == steps
    if not done or not isinstance(accuracy, float):
        return False
    if has_checkpoint(workdir) and not (workdir / "checkpoints" / str(steps)).exists():
        return False
    profile = ", and nothing traced: a new --workdir can be." if setup.config.profile else "."
    say(
        f"{workdir} is complete: {steps} steps, {configs.evaluated_split(setup.config)} accuracy "
        f"{accuracy:.2%}. Nothing to do{profile}"
    )
    return True


def restore(
    setup: Setup, workdir: pathlib.Path, old_summary: dict
) -> tuple[Checkpoints, TrainState | None]:
    """Return the checkpoints of a run, and the newest state, None if there is none.

    The state is restored on the mesh of this command, whichever mesh it was saved on.
    Raises UserError where the checkpoints that the old summary speaks of are gone, and where the
    run is past its last step.
    """
    config_json = runfiles.read_json(workdir / "config.json", required=False)
    run_name = config_json.get("run") or secrets.token_hex(8)
    directory = workdir.resolve() / "checkpoints"
    checkpoints = Checkpoints(directory, setup.config.checkpoint.keep, run_name)
    state = checkpoints.restore(setup.functions.abstract_state)
    ended = old_summary.get("status") in ("completed", "interrupted")
    parts = old_summary.get("parts")
    begun_at = parts[-1]["step"] if isinstance(parts, list) and parts else 0
    saved = old_summary.get("steps") if ended else begun_at
    if state is None and saved:
        raise UserError(
            f"{workdir}: summary.json says that step {saved} was saved, but "
            "checkpoints/ holds none: put them back, or give a new --workdir to begin at step 0"
        )
    if state is not None and int(state.step) > setup.config.steps:
        raise UserError(
            f"steps={setup.config.steps}: {workdir} is at step {int(state.step)} already: "
            "give at least these steps or another --workdir"
        )
    return checkpoints, state


def parts(setup: Setup, old_summary: dict, start: int) -> list[dict]:
    """Return from which step, and where, each command so far trained the run, this one included."""
    old = old_summary.get("parts")
    here = dict(step=start, mesh=setup.place.mesh_name, parallelism=setup.config.parallelism)
    return [*(old if isinstance(old, list) else ()), here]


def write_config(
    setup: Setup, workdir: pathlib.Path, old_summary: dict, run_name: str, start: int
) -> None:
    """Write config.json and say where the run starts, before anything that takes long.

    A run that is stopped from now on can be started again.
    """
    old = runfiles.read_json(workdir / "config.json", required=False)
    write_run_file(workdir / "config.json", setup.saved_config | dict(run=run_name))
    if jax.process_index() == 0:  # the profile of an earlier command may be that of another mesh
        (workdir / "profile.json").unlink(missing_ok=True)
    metrics = workdir / "metrics.jsonl"
    if start:
        steps, old_steps = setup.config.steps, old.get("steps")
        # The learning rate follows the number of steps.
        changed = "" if old_steps in (None, steps) else f", steps {old_steps} -> {steps}"
        placed = _placement_text(setup, old_summary)
        say(f"Resumed {workdir} at step {start} on {placed}{changed}.")
        if jax.process_index() == 0 and (other := provenance.other_code(old_summary)):
            logging.warning("Other code trained the steps before: %s.", other)
    elif metrics.exists():
        say(
            f"{workdir} has no checkpoint to go on from: starting again at step 0; the old metrics "
            f"are kept as {runfiles.free_old_name(metrics).name}."
        )
    elif old:
        say(f"{workdir} was begun before and has no checkpoint: starting at step 0.")


def _placement_text(setup: Setup, old_summary: dict) -> str:
    """Return the mesh of a resumed run, and the scheme; old -> new where they changed."""
    mesh, scheme = setup.place.mesh_name, setup.config.parallelism
    sizes = (old_summary.get("mesh") or setup.place.mesh.shape).values()
    old_mesh, old_scheme = "x".join(map(str, sizes)), old_summary.get("parallelism", scheme)
    text = f"mesh {mesh}" if old_mesh == mesh else f"mesh {old_mesh} -> {mesh}"
    if old_scheme != scheme:
        return f"{text}, parallelism {old_scheme} -> {scheme}"
    row = (old_summary.get("config") or {}).get("placement", {}).get(scheme)
    changed = row is not None and row != configs.as_json(setup.config)["placement"].get(scheme)
    return f"{text}, parallelism {scheme} with another row" if changed else text
