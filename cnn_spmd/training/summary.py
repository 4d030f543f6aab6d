"""Say in summary.json what ran: network, mesh, data, sizes, versions and config."""

import jax

from cnn_spmd import config as configs
from cnn_spmd.training.provenance import command, provenance
from cnn_spmd.training.runfiles import SCHEMA
from cnn_spmd.training.setup import Setup


def about_run(setup: Setup, report: dict, steps: int) -> dict:
    """Return the fields of a summary that setup, program and number of steps decide.

    report: what program.json holds.
    """
    config, mesh = setup.config, setup.place.mesh
    steps_per_epoch = len(setup.data.train_images) // config.batch_size
    return dict(
        schema=SCHEMA,
        experiment=config.experiment,
        **setup.data_fields,
        data_on_device=report["data_on_device"],
        page_locked=setup.feeds[0].page_locked,
        model=config.model.name,
        parallelism=config.parallelism,
        mesh=dict(mesh.shape),
        devices=mesh.size,
        device_kind=report["compiler"]["device_kind"],
        processes=jax.process_count(),
        batch_size=config.batch_size,
        steps=steps,
        epochs=round(steps / steps_per_epoch, 3),
        seed=config.seed,
        dtype=config.dtype,
        param_count=report["param_count"],
        compile_seconds=report["compile_seconds"],
        programs_from_cache=report["programs_from_cache"],
        bytes_per_device=report["bytes_per_device"],
        collectives=report["collectives"],
        predicted_milliseconds=(report.get("prediction") or {}).get("predicted_milliseconds"),
        **provenance(),
        command=command(),
        data_digest=setup.data.digest,
        config=configs.as_json(config),
    )
