"""List what papers published, as data."""

from typing import NamedTuple

# ---- Throughput on several GPUs
#
# All curves are AlexNet on 224x224 images (ILSVRC-2012). In all of them the global batch grows with
# the number of GPUs (weak scaling). "Digitised" values are read off a paper's vector graphics:
# OptCNN's to about 1%, FlexFlow's to about 20 images/s per GPU. values: number of GPUs -> speedup,
# images/s, or images/s per GPU, as the source gives it.

OWT = dict(
    paper="Krizhevsky 2014, arXiv 1404.5997v2", hardware="8 K20, PCIe 2.0", batch="128 per GPU"
)
OPTCNN = dict(
    paper="OptCNN, Jia et al. 2018, arXiv 1802.04924, digitised",
    hardware="4 nodes of 4 P100",
    batch="32 per GPU",
)
FLEXFLOW = dict(
    paper="FlexFlow, Jia et al. 2019 (SysML), digitised", hardware="P100", batch="256 per GPU"
)
TENSORFLOW = dict(
    paper="TensorFlow's tf_cnn_benchmarks, synthetic images, NCCL",
    hardware="DGX-1, 8 P100",
    batch="512 per GPU",
)
CURVES = [
    dict(source, scheme=scheme, unit=unit, values=dict(zip((1, 2, 4, 8, 16), values, strict=False)))
    for source, scheme, unit, values in (
        (OWT, "one weird trick", "speedup", (1, 1.95, 3.74, 6.25)),
        (OPTCNN, "data", "images/s", (745, 1182, 1762, 2485, 3232)),
        (OPTCNN, "one weird trick", "images/s", (745, 1401, 2030, 3044, 4262)),
        (OPTCNN, "layer-wise", "images/s", (745, 1493, 2742, 4937, 9050)),
        (FLEXFLOW, "data", "images/s per GPU", (2244, 1465, 1203, 869, 625)),
        (FLEXFLOW, "one weird trick", "images/s per GPU", (2244, 1811, 1511, 1215, 939)),
        (FLEXFLOW, "FlexFlow", "images/s per GPU", (2244, 2234, 2131, 1917, 1560)),
        (TENSORFLOW, "data", "images/s", (2987, 5658, 10509, 17822)),
    )
]
# Our scheme for the name that the curves use.
SCHEMES = {"data": "data", "one weird trick": "hybrid"}


def curve_throughputs(curve: dict) -> dict[int, float]:
    """Return number of GPUs -> images/s of all; of OWT, relative to one GPU."""
    per_gpu = curve["unit"].endswith("per GPU")
    return {gpus: value * (gpus if per_gpu else 1) for gpus, value in curve["values"].items()}


def curve_speedups(curve: dict) -> dict[int, float]:
    """Return number of GPUs -> throughput relative to one GPU."""
    throughputs = curve_throughputs(curve)
    return {gpus: value / throughputs[1] for gpus, value in throughputs.items()}


def curve_milliseconds(curve: dict) -> dict[int, float]:
    """Return number of GPUs -> milliseconds per step, of a curve in images/s."""
    batch = 1e3 * batch_per_gpu(curve)
    return {gpus: gpus * batch / value for gpus, value in curve_throughputs(curve).items()}


def batch_per_gpu(source: dict) -> int:
    """Return the images per GPU and step of a source or a curve."""
    return int(source["batch"].split(" ")[0])


# ---- Single figures


class PublishedFigure(NamedTuple):
    """One published figure, and which runs measure the same.

    published: a number, or words. measure: a key of measured.MEASURES. where: values that a
    run's fields must have. configs: the --config arguments of the runs. control: the fields in
    which the run of the same seed differs that each run is compared with.
    """

    name: str
    published: float | str
    measure: str
    where: dict
    configs: tuple[str, ...]
    source: str
    control: dict | None = None


EXAMPLE_LAYERS = (
    "cuda-convnet: example-layers (github.com/dnouri/cuda-convnet), wiki "
    "(github.com/mbrukman/cuda-convnet)"
)
ALEXNET_2012 = "AlexNet, Krizhevsky et al. 2012"


def cuda_convnet(
    variant: str, error: float, seconds: float, note: str = ""
) -> list[PublishedFigure]:
    """Return test error and training time of one of cuda-convnet's CIFAR-10 networks."""
    where = dict(experiment=f"cuda_convnet_{variant}", dataset="cifar10")
    configs = (f"cuda_convnet_cifar.py:{variant}",)
    source = f"{EXAMPLE_LAYERS}{note}; one GTX 580"
    return [
        PublishedFigure(f"{variant}: test error, %", error, "error", where, configs, source),
        PublishedFigure(f"{variant}: training, s", seconds, "seconds", where, configs, source),
    ]


def added_error(variant: str, name: str, published: float | str, section: str) -> PublishedFigure:
    """Return how much the error grows without one of the ideas of AlexNet's paper."""
    return PublishedFigure(
        name=f"{name}: added error, points",
        published=published,
        measure="error",
        where=dict(experiment=f"claims_2012_{variant}", dataset="cifar10"),
        configs=(f"claims_2012_cifar.py:{variant}", "claims_2012_cifar.py:base"),
        source=f"{ALEXNET_2012}, section {section}, on ImageNet",
        control=dict(experiment="claims_2012_base"),
    )


def imagenet_2012(name: str, published: float, measure: str) -> PublishedFigure:
    """Return an error of AlexNet's paper on ImageNet."""
    return PublishedFigure(
        name=f"alexnet_2012: {name}, %",
        published=published,
        measure=measure,
        where=dict(experiment="alexnet_2012_imagenet", dataset="imagenet2012", epochs=90.0),
        configs=("alexnet_2012_imagenet.py",),
        source=f"{ALEXNET_2012}, table 2, 1 CNN, validation, ten crops; two GTX 580",
    )


# Table 1 of "One weird trick": GPUs, batch of the dense layers, top-1 error in %, hours, speedup
# (that of the hours). The convolutions' batch is 128 per GPU. PALEO's table 4 copies two of the
# hours wrongly, as 98.95 and 16.68.
ONE_WEIRD_TRICK = [
    (1, 128, 42.33, 98.05, 1),
    (2, 256, 42.63, 50.24, 1.95),
    (2, 128, 42.27, 50.90, 1.93),
    (4, 512, 42.59, 26.20, 3.74),
    (4, 128, 42.44, 26.78, 3.66),
    (8, 1024, 43.28, 15.68, 6.25),
    (8, 128, 42.86, 15.91, 6.16),
]
IMAGENET_TRAIN = 1_281_167  # images of ILSVRC-2012

# What others' models of a step predict. PALEO (Qi et al. 2017, table 4): GPUs -> hours of the rows
# of ONE_WEIRD_TRICK whose two batches are equal. OptCNN: GPUs -> error on its own AlexNet in %.
PALEO_HOURS = {1: 96.31, 2: 49.57, 4: 25.42, 8: 14.37}
PALEO_IMAGES = 1_200_000  # per epoch: its own code gives these hours with no other number
OPTCNN_ERRORS = {1: 1, 2: 4, 4: -5, 8: 2, 16: -1}


def one_weird_trick_milliseconds(gpus: int, hours: float) -> float:
    """Return milliseconds per step, if 90 epochs of 128 images per GPU take `hours`."""
    return 3.6e6 * hours / (90 * IMAGENET_TRAIN / (128 * gpus))


def one_weird_trick(
    gpus: int, dense_batch: int, error: float, hours: float, speedup: float
) -> list[PublishedFigure]:
    """Return the figures of a row of ONE_WEIRD_TRICK."""
    batch = 128 * gpus
    variable = gpus > 1 and dense_batch == 128
    suffix = ":variable" if variable else ""
    name = f"{gpus} GPU{'s' * (gpus > 1)}, batches ({batch}, {dense_batch})"
    source = f"{OWT['paper']}, table 1; {OWT['hardware']}"
    where = dict(
        experiment="owt_imagenet" + "_variable" * variable,
        dataset="imagenet2012",
        devices=gpus,
        batch_size=batch,
        epochs=90.0,
    )
    configs = (f"owt_imagenet.py{suffix} --mesh 1x{gpus} --config.batch_size={batch}",)
    figures = [
        PublishedFigure(f"{name}: top-1 error, %", error, "error", where, configs, source),
        PublishedFigure(f"{name}: hours", hours, "hours", where, configs, source),
    ]
    if gpus > 1:
        name = f"{name}: speedup"
        figures.append(scaling(name, speedup, "hybrid", gpus, 128, source, variable))
    return figures


def scaling(
    name: str,
    published: float,
    scheme: str,
    gpus: int,
    batch_per_gpu: int,
    source: str,
    variable: bool = False,
) -> PublishedFigure:
    """Return a speedup over one GPU of AlexNet for 224x224 images and 1000 classes."""
    mesh = dict(data=gpus, model=1) if scheme == "data" else dict(data=1, model=gpus)
    suffix = ":variable" if variable else ""
    config = (
        f"owt_imagenet.py{suffix} --config.data.name=synthetic --config.steps=220 "
        "--config.optimizer.learning_rate=0.001 --config.steps_per_call=20 "
        "--config.eval.every_epochs=0 --config.checkpoint.every_epochs=0 "
        f"--config.parallelism={scheme} --mesh 1x1,{mesh['data']}x{mesh['model']} "
        f"--batch_per_device {batch_per_gpu}"
    )
    where = dict(
        model="alexnet",
        param_count=61_100_840,
        parallelism=scheme,
        mesh=mesh,
        devices=gpus,
        batch_size=batch_per_gpu * gpus,
        variable=variable,
    )
    return PublishedFigure(name, published, "speedup", where, (config,), source)


def curve_figures(curve: dict) -> list[PublishedFigure]:
    """Return a curve's speedups on 2, 4 and 8 GPUs."""
    speedups = curve_speedups(curve)
    return [
        scaling(
            f"{curve['scheme']}, batch {curve['batch']}, {gpus} GPUs",
            round(speedups[gpus], 2),
            SCHEMES[curve["scheme"]],
            gpus,
            batch_per_gpu(curve),
            f"{curve['paper']}; {curve['hardware']}",
        )
        for gpus in (2, 4, 8)
    ]


# Table 6 of "Deep Residual Learning": layers -> test error in %, parameters in millions. The error
# of 110 layers is the mean of five runs; their best has 6.43.
RESIDUAL_NETWORKS = {
    20: (8.75, 0.27),
    32: (7.51, 0.46),
    44: (7.17, 0.66),
    56: (6.97, 0.85),
    110: (6.61, 1.7),
}
RESIDUAL_RECIPE = dict(dataset="cifar10", batch_size=128, steps=64_000)
RESIDUAL_PAPER = "He et al. 2015, arXiv 1512.03385"


def residual_network(layers: int, error: float) -> PublishedFigure:
    """Return the error of a row of RESIDUAL_NETWORKS."""
    best = "; mean of five runs, the best has 6.43" if layers == 110 else ""
    return PublishedFigure(
        name=f"ResNet-{layers}: test error, %",
        published=error,
        measure="error",
        where=dict(RESIDUAL_RECIPE, experiment=f"resnet_cifar_{layers}"),
        configs=(f"resnet_cifar.py:{layers}",),
        source=f"{RESIDUAL_PAPER}, table 6{best}",
    )


def plain_network(layers: int) -> PublishedFigure:
    """Return how much larger the error of a plain network is than that of plain-20."""
    return PublishedFigure(
        name=f"plain-{layers}: error added to plain-20's, points",
        published="grows with depth",
        measure="error",
        where=dict(RESIDUAL_RECIPE, experiment=f"resnet_cifar_plain_{layers}"),
        configs=(f"resnet_cifar.py:plain_{layers}", "resnet_cifar.py:plain_20"),
        source=f"{RESIDUAL_PAPER}, figure 6, a plot without numbers",
        control=dict(experiment="resnet_cifar_plain_20"),
    )


LARS = "You et al. 2017, arXiv 1708.03888, on ImageNet"
# The table and the gap with batch norm, as notes on the paper have them.
LARS_NOTES = f"{LARS}, as quoted in github.com/lcy-seso/LearningNotes"
LARS_ABSTRACT = f"{LARS}, abstract: AlexNet up to 8K"
NO_LOSS = "no loss"
# Variant of experiments/large_batch_cifar.py, batch, points of accuracy that the batch costs,
# source. Points are words, as they are another data set's, and its small batch is another.
LARGE_BATCHES = [
    ("linear", 4096, "4.5", f"{LARS_NOTES}: accuracy 57.6% at 256, 53.1% at 4K"),
    ("linear", 8192, "12.8", f"{LARS_NOTES}: accuracy 57.6% at 256, 44.8% at 8K"),
    ("linear_bn", 8192, "2.2 instead of 14", f"{LARS_NOTES}: the gap at 8K with batch norm"),
    ("lars", 1024, NO_LOSS, LARS_ABSTRACT),
    ("lars", 4096, NO_LOSS, LARS_ABSTRACT),
    ("lars", 8192, NO_LOSS, LARS_ABSTRACT),
    ("lars_bn", 1024, NO_LOSS, LARS_ABSTRACT),
    ("lars_bn", 4096, NO_LOSS, LARS_ABSTRACT),
    ("lars_bn", 8192, NO_LOSS, LARS_ABSTRACT),
]


def added_by_batch(variant: str, batch: int, points: str, source: str) -> PublishedFigure:
    """Return how much larger the error is with this batch than with 128 images."""
    config = f"large_batch_cifar.py:{variant} --config.batch_size="
    return PublishedFigure(
        name=f"{variant}, batch {batch:,}: added error, points",
        published=points,
        measure="error",
        where=dict(
            experiment=f"large_batch_cifar_{variant}",
            dataset="cifar10",
            batch_size=batch,
            epochs=100.0,
        ),
        configs=(f"{config}{batch}", f"{config}128"),
        source=source,
        control=dict(batch_size=128),
    )


# Title of a table -> its figures.
FIGURES: dict[str, list[PublishedFigure]] = {
    "cuda-convnet's CIFAR-10 networks": [
        *cuda_convnet("80sec", 26, 80),
        *cuda_convnet("19pct", 19, 20 * 60),
        *cuda_convnet("18pct", 18, 20 * 60),
        *cuda_convnet("13pct", 12.6, 21.7 * 60, "; logged, the front page says 13%, 25 min"),
        *cuda_convnet("11pct", 11, 75 * 60),
    ],
    "Claims of AlexNet 2012, on CIFAR-10": [
        PublishedFigure(
            name="tanh: epochs to 25% training error, times ReLU's",
            published=6,
            measure="epochs",
            where=dict(experiment="claims_2012_tanh", dataset="cifar10"),
            configs=("claims_2012_cifar.py:tanh", "claims_2012_cifar.py:relu"),
            source=f"{ALEXNET_2012}, figure 1, on CIFAR-10",
            control=dict(experiment="claims_2012_relu"),
        ),
        PublishedFigure(
            name="11pct without response norms: added error, points",
            published=2,
            measure="error",
            where=dict(experiment="cuda_convnet_11pct_no_lrn", dataset="cifar10"),
            configs=("cuda_convnet_cifar.py:11pct_no_lrn", "cuda_convnet_cifar.py:11pct"),
            source=f"{ALEXNET_2012}, section 3.3, on CIFAR-10: 13% without, 11% with",
            control=dict(experiment="cuda_convnet_11pct"),
        ),
        added_error("no_lrn", "without response norms", 1.4, "3.3"),
        added_error("plain_pool", "pools that do not overlap", 0.4, "3.4"),
        added_error("no_dropout", "without dropout", "overfits substantially", "4.2"),
        added_error("no_conv2", "without conv2", 2, "7 (about)"),
        added_error("no_conv3", "without conv3", 2, "7 (about)"),
        added_error("no_conv4", "without conv4", 2, "7 (about)"),
        added_error("one_tower", "one tower of half the maps", 1.7, "3.2"),
    ],
    "AlexNet 2012 on ImageNet": [
        imagenet_2012("top-1 error", 40.7, "error"),
        imagenet_2012("top-5 error", 18.2, "top-5 error"),
    ],
    "Residual and plain networks": [
        *(residual_network(layers, error) for layers, (error, _) in RESIDUAL_NETWORKS.items()),
        *(plain_network(layers) for layers in (32, 44, 56)),
    ],
    "Large batches": [added_by_batch(*row) for row in LARGE_BATCHES],
    "One weird trick": [figure for row in ONE_WEIRD_TRICK for figure in one_weird_trick(*row)],
    "Speedup over one GPU": [
        figure
        for curve in CURVES[1:]
        if curve["scheme"] in SCHEMES
        for figure in curve_figures(curve)
    ],
}
