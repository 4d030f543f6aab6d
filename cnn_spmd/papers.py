"""Published throughput of AlexNet on several GPUs, as data, and the speed of the links between GPUs we know.

All are AlexNet on 224x224 images (ILSVRC-2012), and in all the global batch grows with the number of GPUs (weak scaling).
Digitised figures are read off a paper's vector figure: OptCNN's to about 1%, FlexFlow's to about 20 images/s a GPU.
"""

# Each curve: number of GPUs -> speedup, images/s, or images/s a GPU, as the source gives it.
OWT = dict(paper="Krizhevsky 2014, arXiv 1404.5997v2", hardware="8 K20, PCIe 2.0", batch="128 a GPU")
OPTCNN = dict(paper="OptCNN, Jia et al. 2018, arXiv 1802.04924, digitised", hardware="4 nodes of 4 P100", batch="32 a GPU")
FLEXFLOW = dict(paper="FlexFlow, Jia et al. 2019 (SysML), digitised", hardware="P100", batch="256 a GPU")
TENSORFLOW = dict(paper="TensorFlow's tf_cnn_benchmarks, synthetic images, NCCL", hardware="DGX-1, 8 P100", batch="512 a GPU")
CURVES = [
    dict(OWT, scheme="one weird trick", unit="speedup", values={1: 1, 2: 1.95, 4: 3.74, 8: 6.25}),
    dict(OPTCNN, scheme="data", unit="images/s", values={1: 745, 2: 1182, 4: 1762, 8: 2485, 16: 3232}),
    dict(OPTCNN, scheme="one weird trick", unit="images/s", values={1: 745, 2: 1401, 4: 2030, 8: 3044, 16: 4262}),
    dict(OPTCNN, scheme="layer-wise", unit="images/s", values={1: 745, 2: 1493, 4: 2742, 8: 4937, 16: 9050}),
    dict(FLEXFLOW, scheme="data", unit="images/s a GPU", values={1: 2244, 2: 1465, 4: 1203, 8: 869, 16: 625}),
    dict(FLEXFLOW, scheme="one weird trick", unit="images/s a GPU", values={1: 2244, 2: 1811, 4: 1511, 8: 1215, 16: 939}),
    dict(FLEXFLOW, scheme="FlexFlow", unit="images/s a GPU", values={1: 2244, 2: 2234, 4: 2131, 8: 1917, 16: 1560}),
    dict(TENSORFLOW, scheme="data", unit="images/s", values={1: 2987, 2: 5658, 4: 10509, 8: 17822}),
]

# Bytes/s that a device sends at most, by device_kind: NVLink 4, 18 links of 25 GB/s each way (datasheets of H100 and H200 SXM).
LINKS = {"NVIDIA H100 80GB HBM3": 450e9, "NVIDIA H200": 450e9}


def speedups(curve: dict) -> dict[int, float]:
    """Number of GPUs -> throughput relative to one GPU."""
    values, each = curve["values"], curve["unit"].endswith("a GPU")
    return {gpus: value * (gpus if each else 1) / values[1] for gpus, value in values.items()}
