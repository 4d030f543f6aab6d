"""What papers published, as data."""


# ---- Throughput on several GPUs. All are AlexNet on 224x224 images (ILSVRC-2012), and in all the global batch grows with the
# number of GPUs (weak scaling). Digitised figures are read off a paper's vector figure: OptCNN's to about 1%, FlexFlow's to
# about 20 images/s a GPU. Each curve: number of GPUs -> speedup, images/s, or images/s a GPU, as the source gives it.

OWT = dict(
    paper="Krizhevsky 2014, arXiv 1404.5997v2", hardware="8 K20, PCIe 2.0", batch="128 a GPU"
)
OPTCNN = dict(
    paper="OptCNN, Jia et al. 2018, arXiv 1802.04924, digitised",
    hardware="4 nodes of 4 P100",
    batch="32 a GPU",
)
FLEXFLOW = dict(
    paper="FlexFlow, Jia et al. 2019 (SysML), digitised", hardware="P100", batch="256 a GPU"
)
TENSORFLOW = dict(
    paper="TensorFlow's tf_cnn_benchmarks, synthetic images, NCCL",
    hardware="DGX-1, 8 P100",
    batch="512 a GPU",
)
CURVES = [
    dict(OWT, scheme="one weird trick", unit="speedup", values={1: 1, 2: 1.95, 4: 3.74, 8: 6.25}),
    dict(
        OPTCNN, scheme="data", unit="images/s", values={1: 745, 2: 1182, 4: 1762, 8: 2485, 16: 3232}
    ),
    dict(
        OPTCNN,
        scheme="one weird trick",
        unit="images/s",
        values={1: 745, 2: 1401, 4: 2030, 8: 3044, 16: 4262},
    ),
    dict(
        OPTCNN,
        scheme="layer-wise",
        unit="images/s",
        values={1: 745, 2: 1493, 4: 2742, 8: 4937, 16: 9050},
    ),
    dict(
        FLEXFLOW,
        scheme="data",
        unit="images/s a GPU",
        values={1: 2244, 2: 1465, 4: 1203, 8: 869, 16: 625},
    ),
    dict(
        FLEXFLOW,
        scheme="one weird trick",
        unit="images/s a GPU",
        values={1: 2244, 2: 1811, 4: 1511, 8: 1215, 16: 939},
    ),
    dict(
        FLEXFLOW,
        scheme="FlexFlow",
        unit="images/s a GPU",
        values={1: 2244, 2: 2234, 4: 2131, 8: 1917, 16: 1560},
    ),
    dict(TENSORFLOW, scheme="data", unit="images/s", values={1: 2987, 2: 5658, 4: 10509, 8: 17822}),
]

# Bytes/s that a device sends at most, by device_kind: NVLink 4, 18 links of 25 GB/s each way (datasheets of H100 and H200 SXM).
LINKS = {"NVIDIA H100 80GB HBM3": 450e9, "NVIDIA H200": 450e9}


def speedups(curve: dict) -> dict[int, float]:
    """Number of GPUs -> throughput relative to one GPU."""
    values, each = curve["values"], curve["unit"].endswith("a GPU")
    return {gpus: value * (gpus if each else 1) / values[1] for gpus, value in values.items()}


# ---- Figures. Each: name, published (a number, or words), measure (MEASURES), where (what the fields of a run must be),
# configs (of the commands that make the runs), source; control: the experiment that the run of the same seed is held against.


def cuda_convnet(variant: str, error: float, seconds: float, source: str) -> list[dict]:
    shared = dict(
        where=dict(experiment=f"cuda_convnet_{variant}", dataset="cifar10"),
        configs=[f"cuda_convnet_cifar.py:{variant}"],
    )
    return [
        dict(
            shared,
            name=f"{variant}: test error, %",
            published=error,
            measure="error",
            source=source,
        ),
        dict(
            shared,
            name=f"{variant}: training, s",
            published=seconds,
            measure="seconds",
            source=f"{source}; one GTX 580",
        ),
    ]


def claim(variant: str, name: str, published: float | str, place: str) -> dict:
    return dict(
        name=f"{name}: test error, points more",
        published=published,
        measure="error",
        control="claims_2012_base",
        where=dict(experiment=f"claims_2012_{variant}", dataset="cifar10"),
        configs=[f"claims_2012_cifar.py:{variant}", "claims_2012_cifar.py:base"],
        source=f"AlexNet 2012, {place}, on ImageNet",
    )


# Table 1 (PALEO's table 4 copies two hours wrongly: 98.95 and 16.68): GPUs, batch of the dense layers, top-1 error in %, hours,
# speedup, which is that of the hours. The convolutions' batch is 128 a GPU.
ONE_WEIRD_TRICK = [
    (1, 128, 42.33, 98.05, 1),
    (2, 256, 42.63, 50.24, 1.95),
    (2, 128, 42.27, 50.90, 1.93),
    (4, 512, 42.59, 26.20, 3.74),
    (4, 128, 42.44, 26.78, 3.66),
    (8, 1024, 43.28, 15.68, 6.25),
    (8, 128, 42.86, 15.91, 6.16),
]


def one_weird_trick(
    gpus: int, dense_batch: int, error: float, hours: float, speedup: float
) -> list[dict]:
    """The figures of a row of ONE_WEIRD_TRICK."""
    batch, variable = 128 * gpus, gpus > 1 and dense_batch == 128
    experiment = "owt_imagenet" + "_variable" * variable
    name = f"{gpus} GPU{'s' * (gpus > 1)}, batches ({batch}, {dense_batch})"
    source = f"{OWT['paper']}, table 1; {OWT['hardware']}"
    whole = dict(
        where=dict(
            experiment=experiment,
            dataset="imagenet2012",
            devices=gpus,
            batch_size=batch,
            epochs=90.0,
        ),
        source=source,
        configs=[
            f"owt_imagenet.py{':variable' * variable} --mesh 1x{gpus} --config.batch_size={batch}"
        ],
    )
    return [
        dict(whole, name=f"{name}: top-1 error, %", published=error, measure="error"),
        dict(whole, name=f"{name}: hours", published=hours, measure="hours"),
        *(
            [scaling(f"{name}: speedup", speedup, "hybrid", gpus, 128, source, variable)]
            if gpus > 1
            else []
        ),
    ]


def scaling(
    name: str,
    published: float,
    scheme: str,
    gpus: int,
    batch: int,
    source: str,
    variable: bool = False,
) -> dict:
    """A speedup over one GPU, each GPU with `batch` images; of AlexNet for 224x224 images and 1000 classes."""
    mesh = dict(data=gpus, model=1) if scheme == "data" else dict(data=1, model=gpus)
    return dict(
        name=name,
        published=published,
        measure="speedup",
        source=source,
        where=dict(
            model="alexnet",
            param_count=61_100_840,
            parallelism=scheme,
            mesh=mesh,
            devices=gpus,
            batch_size=batch * gpus,
            variable=variable,
        ),
        configs=[
            f"owt_imagenet.py{':variable' * variable} --config.data.name=synthetic --config.steps=220 "
            "--config.optimizer.learning_rate=0.001 --config.steps_per_call=20 "
            "--config.eval.every_epochs=0 --config.checkpoint.every_epochs=0 "
            f"--config.parallelism={scheme} --mesh 1x1,{mesh['data']}x{mesh['model']} --batch_per_device {batch}"
        ],
    )


WHOLE_IMAGENET = dict(
    where=dict(experiment="alexnet_2012_imagenet", dataset="imagenet2012", epochs=90.0),
    configs=["alexnet_2012_imagenet.py"],
    source="AlexNet 2012, table 2, 1 CNN, validation, ten crops; two GTX 580",
)
EXAMPLE_LAYERS = "cuda-convnet: example-layers (github.com/dnouri/cuda-convnet), wiki (github.com/mbrukman/cuda-convnet)"
SCHEMES = {"data": "data", "one weird trick": "hybrid"}
FIGURES: dict[str, list[dict]] = {
    "cuda-convnet's CIFAR-10 nets": [
        *cuda_convnet("80sec", 26, 80, EXAMPLE_LAYERS),
        *cuda_convnet("19pct", 19, 20 * 60, EXAMPLE_LAYERS),
        *cuda_convnet("18pct", 18, 20 * 60, EXAMPLE_LAYERS),
        *cuda_convnet(
            "13pct", 12.6, 21.7 * 60, f"{EXAMPLE_LAYERS}; logged, the front page says 13%, 25 min"
        ),
        *cuda_convnet("11pct", 11, 75 * 60, EXAMPLE_LAYERS),
    ],
    "Claims of AlexNet 2012, on CIFAR-10": [
        dict(
            name="tanh: epochs to 25% training error, times ReLU's",
            published=6,
            measure="epochs",
            control="claims_2012_relu",
            where=dict(experiment="claims_2012_tanh", dataset="cifar10"),
            source="AlexNet 2012, figure 1, on CIFAR-10",
            configs=["claims_2012_cifar.py:tanh", "claims_2012_cifar.py:relu"],
        ),
        dict(
            name="11pct without response norms: test error, points more",
            published=2,
            measure="error",
            control="cuda_convnet_11pct",
            where=dict(experiment="cuda_convnet_11pct_no_lrn", dataset="cifar10"),
            configs=["cuda_convnet_cifar.py:11pct_no_lrn", "cuda_convnet_cifar.py:11pct"],
            source="AlexNet 2012, 3.3, on CIFAR-10: 13% without, 11% with",
        ),
        claim("no_lrn", "without response norms", 1.4, "3.3"),
        claim("plain_pool", "pools that do not overlap", 0.4, "3.4"),
        claim("no_dropout", "without dropout", "overfits substantially", "4.2"),
        claim("no_conv2", "without conv2", 2, "7 (about)"),
        claim("no_conv3", "without conv3", 2, "7 (about)"),
        claim("no_conv4", "without conv4", 2, "7 (about)"),
        claim("one_tower", "one tower of half the maps", 1.7, "3.2"),
    ],
    "AlexNet 2012 on ImageNet": [
        dict(WHOLE_IMAGENET, name="alexnet_2012: top-1 error, %", published=40.7, measure="error"),
        dict(
            WHOLE_IMAGENET,
            name="alexnet_2012: top-5 error, %",
            published=18.2,
            measure="top-5 error",
        ),
    ],
    "One weird trick": [figure for row in ONE_WEIRD_TRICK for figure in one_weird_trick(*row)],
    "Speedup over one GPU": [
        scaling(
            f"{curve['scheme']}, batch {curve['batch']}, {gpus} GPUs: speedup",
            round(speedups(curve)[gpus], 2),
            SCHEMES[curve["scheme"]],
            gpus,
            int(curve["batch"].split()[0]),
            f"{curve['paper']}; {curve['hardware']}",
        )
        for curve in CURVES[1:]
        if curve["scheme"] in SCHEMES
        for gpus in (2, 4, 8)
    ],
}

# ---- Measured
