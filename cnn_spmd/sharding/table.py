"""THE TABLE: where every kind of array lives, for each kind of parallelism.

Models, data and optimizer name *logical* axes only ("fc1_out", "conv_batch"). A row of the table
maps them to the axes of the mesh, and what it does not name is replicated. Changing where an array
lives is changing one entry here.
"""

from typing import Any

BOTH = ("data", "model")

# Activations have a batch axis: of the convolutions, of the hidden dense layers, of the output layer (logits, labels and
# loss). Weights have an input (rows) and an output (columns) axis a layer; a layer's input is split as its kernel's rows
# are, its output as its columns. fc1 and fc2 are the 4096-wide layers, fc3 is the output layer. `group` axes are the
# channels of a grouped convolution, which fall into towers: split, each device works on towers of its own.
TABLE: dict[str, dict[str, Any]] = {
    # Every device holds all weights and its share of the batch; gradients are all-reduced.
    "data": dict(conv_batch=BOTH, dense_batch=BOTH, output_batch=BOTH),
    # Every layer's columns are split; each layer's input is gathered along `model`.
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
    # One weird trick (Krizhevsky 2014, scheme a): convolutions as in `data`; the dense layers, which hold 96% of the weights
    # and do 8% of the work (224x224), are split by columns, and their input is gathered along `model` instead. The output
    # layer takes fc2's columns as they lie, by rows: a few logits are summed, instead of 4096 activations gathered.
    "hybrid": dict(
        conv_batch=BOTH,
        dense_batch="data",
        output_batch="data",
        fc1_out="model",
        fc2_out="model",
        fc3_in="model",
    ),
    # fc1 by columns, fc2 by rows: nothing moves between the two (PaSE, IPDPS 2021; Megatron). fc2's partial sums are
    # reduced straight back to a batch over both axes, where the small output layer is data parallel.
    "hybrid_alternating": dict(
        conv_batch=BOTH, dense_batch="data", output_batch=BOTH, fc1_out="model", fc2_in="model"
    ),
    # AlexNet's two GPUs (2012): a tower each, which meet in conv3 and the dense layers only.
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

# CIFAR-10's 10 classes divide by few model axes. The output layer is small, so it is replicated then, and the placement
# report of the run says so; for every other axis, an indivisible size is an error.
MAY_REPLICATE = ("fc3_out",)
