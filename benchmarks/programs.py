"""Compiles the schemes for meshes that are not here and writes a report each: python benchmarks/programs.py

Needs requirements.txt (jax[cuda12]) for the GPU compiler; no GPU. Writes results/data/programs/*.json, from which
`python -m cnn_spmd.report` makes the README's table. float32, so that the CPU's and the GPU's bytes compare.
"""

import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
SCHEMES = [
    ("data", False),
    ("model", True),
    ("hybrid", True),
    ("hybrid_alternating", True),
]  # name, splits `model`
SIZES = {32: 10, 224: 1000}  # image size, classes
MESHES = {8: [(4, 2), (1, 8)], 64: [(8, 8)], 512: [(64, 8)]}


def main() -> None:
    os.environ.update(
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", JAX_PLATFORMS="cpu"
    )  # both before jax is imported
    sys.path.insert(0, str(ROOT))
    import jax

    from cnn_spmd.analysis import target
    from cnn_spmd.training.dry_run import dry_run
    from cnn_spmd.training.provenance import provenance
    from experiments.alexnet_cifar import get_config

    jax.config.update("jax_num_cpu_devices", 8)
    # Before the first file is written: afterwards the checkout differs from its commit.
    made_by = provenance()
    folder = ROOT / "results" / "data" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    cases = [
        ("alexnet", size, parallelism, mesh if splits else (count, 1), compiler)
        for count, meshes in MESHES.items()
        for compiler in (("cpu", "h100") if count == 8 else ("h100",))
        for size in SIZES
        for parallelism, splits in SCHEMES
        for mesh in (meshes if splits else meshes[:1])
    ]
    cases += [("alexnet_2012", 224, "two_tower", (4, 2), compiler) for compiler in ("cpu", "h100")]
    for model, size, parallelism, (data, columns), compiler in cases:
        config = get_config()
        config.update(
            dict(
                batch_size=max(1024, 16 * data * columns),
                parallelism=parallelism,
                dtype="float32",
                mesh=dict(data=data, model=columns),
                model=dict(name=model),
            )
        )
        config.data.update(
            dict(
                name="synthetic",
                synthetic=dict(
                    image_size=size, classes=SIZES[size], train_examples=config.batch_size
                ),
            )
        )
        devices = (
            None if compiler == "cpu" else target.devices(f"h100:{max(1, data * columns // 8)}x8")
        )
        report = dry_run(config, None, devices)
        report = {
            name: value
            for name, value in report.items()
            if name not in ("placement", "activations", "closed_form")
        }
        report |= dict(image_size=size, **made_by)
        name = f"{model}-{size}-{parallelism}-{data}x{columns}-{compiler}.json"
        (folder / name).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
