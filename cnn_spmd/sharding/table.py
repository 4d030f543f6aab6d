"""The placement table: where every kind of array lives, for each scheme.

A mesh arranges the devices in a grid, for instance 4x2: four along the mesh axis `data`, two along
`model`. Networks name only *logical* axes of their arrays, such as "conv_batch" (the batch of the
convolutions) or "fc1_out" (the columns of fc1's kernel). A scheme is a row of TABLE: it maps each
logical axis to the mesh axes that it is split over. A logical axis that a row does not name is not
split: each device holds it whole. To move an array, change one entry here.
"""

from cnn_spmd.config import MESH_AXES

ALL = MESH_AXES  # ("data", "model"): split over all devices

# Activations have one batch axis per group of layers: convolutions, hidden dense layers, output
# layer. Kernels have an input axis (rows) and an output axis (columns). A layer's input is split
# as its kernel's rows are, and its output as its kernel's columns are. fc1 and fc2 are the
# 4096-wide hidden layers, fc3 is the output layer. The `group` axes are the channels of a grouped
# convolution: split, each device works on groups of its own.
TABLE: dict[str, dict[str, str | tuple[str, ...]]] = {
    # Pure data parallelism. Each device holds all weights and its shard of the batch; the gradients
    # are all-reduced.
    "data": dict(conv_batch=ALL, dense_batch=ALL, output_batch=ALL),
    # Pure model parallelism. The columns of every layer are split over `model`, and the input of
    # every layer is gathered along it.
    "model": dict(
        conv_batch="data",
        dense_batch="data",
        output_batch="data",
        conv_out="model",
        group_out="model",
        fc1_out="model",
        fc2_out="model",
        fc3_out="model",
    ),
    # One weird trick (Krizhevsky 2014, section 4, scheme a). The convolutions are data parallel.
    # The dense layers hold 96% of AlexNet's weights and do 8% of its work at 224x224: their columns
    # are split, and their input is gathered along `model`. fc3 takes fc2's columns where they lie,
    # as its rows: devices then sum a few logits instead of gathering 4096 activations.
    "hybrid": dict(
        conv_batch=ALL,
        dense_batch="data",
        output_batch="data",
        fc1_out="model",
        fc2_out="model",
        fc3_in="model",
    ),
    # As hybrid, but fc2 is split by rows: nothing moves between fc1 and fc2 (PaSE, IPDPS 2021;
    # Megatron-LM, 2019). fc2's partial sums are reduced straight to a batch that is split over all
    # devices, where the small output layer is data parallel.
    "hybrid_alternating": dict(
        conv_batch=ALL,
        dense_batch="data",
        output_batch=ALL,
        fc1_out="model",
        fc2_in="model",
    ),
    # The two GPUs of AlexNet (Krizhevsky et al. 2012, figure 2). Each holds one tower of the
    # network; the towers meet only in conv3 and in the dense layers.
    "two_tower": dict(
        conv_batch="data",
        dense_batch="data",
        output_batch="data",
        conv_out="model",
        group_in="model",
        group_out="model",
        fc1_out="model",
        fc2_out="model",
        fc3_out="model",
    ),
}

LOGICAL_AXES = (
    "conv_batch",
    "dense_batch",
    "output_batch",
    "conv_in",
    "conv_out",
    "group_in",
    "group_out",
    "fc1_in",
    "fc1_out",
    "fc2_in",
    "fc2_out",
    "fc3_in",
    "fc3_out",
)

# A size that does not divide by its mesh axes is an error, except here: the 10 classes of CIFAR-10
# divide by few meshes. The output layer is small, so each device then holds it whole, and the
# placement report says so.
MAY_REPLICATE = ("fc3_out",)
