"""Predict published step times on several GPUs from the published step of one GPU.

  python benchmarks/history.py

Needs no GPU. Writes one file per paper to results/data/predictions/;
`python -m cnn_spmd.papers --write` makes results/predictions.md of them. All papers train AlexNet
at 224x224 in float32. A prediction starts from the published step of one GPU. The rest comes from
the card and its links (cnn_spmd/analysis/cards/, data sheets) and from the closed form of the
scheme. Nothing is fitted to a published step on several GPUs.

Times in a file are milliseconds, those in `terms` too. `schedule` says how the inputs of the first
dense layer travel in one weird trick:

  at once    all devices send at the same time, as XLA's programs do (the paper's schemes a and c)
  by turns   one device after the other sends those of its 128 images (scheme b, which the paper
             measured)
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from cnn_spmd.analysis import cost
from cnn_spmd.analysis.cost import Card, Links
from cnn_spmd.papers import published
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.training import build, prediction, program_report, runfiles
from cnn_spmd.training.provenance import provenance
from experiments.owt_imagenet import get_config

FOLDER = DATA / "predictions"
MOST_DEVICES = 16

# OptCNN's and FlexFlow's cluster: one 100 Gb/s InfiniBand per node of four GPUs, in bytes/s.
NODE_BANDWIDTH = 12.5e9
GPUS_PER_NODE = 4
GPUS_PER_HOST = 8  # of Krizhevsky's machine, and of a DGX-1


def setup_of(
    devices: int, parallelism: str, batch_per_device: int, variable: bool = False
) -> build.Setup:
    """Return the Setup of AlexNet on `devices` devices, of which nothing is compiled.

    variable: update the dense layers after each 128 images.
    """
    config = get_config("variable" if variable else "")
    config.parallelism = parallelism
    config.dtype = "float32"
    config.steps = 10
    config.batch_size = devices * batch_per_device
    data = devices if parallelism == "data" else 1
    config.mesh.update(data=data, model=devices // data)
    config.data.update(name="synthetic", crop=0)
    config.data.synthetic.update(image_size=224, train_examples=config.batch_size, test_examples=1)
    return build.prepare(config, jax.devices()[:devices])


def by_turns(moves: Sequence[dict], devices: int) -> Iterator[dict]:
    """Yield the moves, those of fc1's input once per device.

    In its turn a device sends to each of the others, one after the other. That takes as long as the
    collective in which all devices send at once. Backward, the gradients come back the same way.
    """
    for move in moves:
        yield from [move] * (devices if move["what"] == "fc1 input" else 1)


def predict(
    card: Card,
    one_device_milliseconds: float,
    setup: build.Setup,
    gpus_per_host: int,
    schedule: str = "at once",
) -> dict:
    """Return the prediction of one program, as a row of the file."""
    config, mesh = setup.config, setup.place.mesh.shape
    moves, _ = program_report.theory_of(setup)
    if schedule == "by turns":
        moves = list(by_turns(moves, setup.place.mesh.size))
    seconds = one_device_milliseconds / 1e3
    terms = prediction.terms_of(setup, card, moves, seconds, gpus_per_host)
    return dict(
        devices=setup.place.mesh.size,
        mesh=dict(mesh),
        parallelism=config.parallelism,
        batch_per_device=config.batch_size // setup.place.mesh.size,
        dense_microbatch=config.dense_microbatch,
        schedule=schedule,
        predicted_milliseconds=round(1e3 * terms.step, 3),
        terms={name: round(1e3 * seconds, 3) for name, seconds in terms._asdict().items()},
    )


def one_weird_trick() -> dict:
    """Return the predictions of table 1 of One weird trick, whose eight GPUs are one host's."""
    card, rows = cost.load("k20"), []
    alone, *measured = (
        published.one_weird_trick_milliseconds(gpus, hours)
        for gpus, _, _, hours, _ in published.ONE_WEIRD_TRICK
    )
    for (gpus, dense_batch, *_), each in zip(published.ONE_WEIRD_TRICK[1:], measured, strict=True):
        setup = setup_of(gpus, "hybrid", 128, variable=dense_batch == 128)
        for schedule in ("at once", "by turns"):
            row = predict(card, alone, setup, GPUS_PER_HOST, schedule)
            rows.append(row | dict(measured_milliseconds=round(each, 3)))
    return file_of(published.OWT, card, alone, rows)


def curves(source: dict, card: Card, gpus_per_host: int) -> dict:
    """Return the predictions of a paper's curves under schemes that we have."""
    rows = []
    for curve in published.CURVES:
        if curve["paper"] == source["paper"] and curve["scheme"] in published.SCHEMES:
            scheme, batch = published.SCHEMES[curve["scheme"]], published.batch_per_gpu(curve)
            measured = published.curve_milliseconds(curve)
            alone = measured.pop(1)
            for devices, each in measured.items():
                row = predict(card, alone, setup_of(devices, scheme, batch), gpus_per_host)
                rows.append(row | dict(measured_milliseconds=round(each, 3)))
    return file_of(source, card, alone, rows)


def with_one_link_per_node(card: Card) -> Card:
    """Return the card in nodes whose GPUs share NODE_BANDWIDTH, at the card's own latency."""
    collectives = {
        operation: [(0, latency), (1e9, latency + 1e9 * GPUS_PER_NODE / NODE_BANDWIDTH)]
        for operation, ((_, latency), _) in card.spans["cluster"].collectives.items()
    }
    return dataclasses.replace(card, spans=card.spans | dict(cluster=Links(collectives)))


def file_of(source: dict, card: Card, one_device_milliseconds: float, rows: list[dict]) -> dict:
    """Return the content of a paper's file, except for where it was made."""
    return dict(
        paper=source["paper"],
        hardware=source["hardware"],
        one_device_milliseconds=round(one_device_milliseconds, 3),
        predictions=rows,
        calibration=dataclasses.asdict(card),
    )


def main() -> None:
    """Write the predictions of each paper."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MOST_DEVICES)
    code = provenance()  # asked first: the files make the checkout differ from its commit
    dgx1 = cost.load("p100")
    nodes = with_one_link_per_node(dgx1)
    for name, content in (
        ("owt", one_weird_trick()),
        ("optcnn", curves(published.OPTCNN, nodes, GPUS_PER_NODE)),
        ("flexflow", curves(published.FLEXFLOW, nodes, GPUS_PER_NODE)),
        ("tensorflow", curves(published.TENSORFLOW, dgx1, GPUS_PER_HOST)),
    ):
        runfiles.write_json(FOLDER / f"{name}.json", content | code)


if __name__ == "__main__":
    main()
