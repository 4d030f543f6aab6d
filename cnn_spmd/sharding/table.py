"""The placement table: where every kind of array lives, for each scheme.

A mesh arranges the devices in a grid. On a 4x2 mesh, four devices lie along the mesh axis `data`
and two along `model`. Networks give the dimensions of their arrays *logical* axes, such as
"conv_batch" (the batch of the convolutions) or "fc1_out" (the columns of fc1's kernel). A scheme is
a row of TABLE: it maps logical axes to the mesh axes that split them.

  fc1_out="model"   fc1's kernel [fc1_in, fc1_out] gets PartitionSpec(None, "model"): each device
                    holds half of the columns, and the four along `data` hold the same half

A logical axis that a row does not name is not split. sharding/placement.py turns a row into JAX
shardings. To move an array, change its entry here, or give the config a row of your own
(`config.placement`; own_rows.py reads it). Three things follow without an entry: a momentum lives
with its weight, and the averages of a batch norm with its channels; metrics and other model state
are on every device; the data set is too, unless it is streamed or sharded (`data.resident`).

A row says where arrays are used. Its key `at_rest`, a row of the same form, splits weights further
between steps. Each layer then asks for its whole kernel (sharding/at_rest.py). XLA gathers all of
them as a step starts or, in a row with the key `gather_again`, one layer's after another (True: in
the backward pass again; False: only in the forward pass).

tests/test_schemes.py checks, for every scheme, that it computes what one device computes and moves
what theory says.
"""

from typing import Any

from cnn_spmd.config import MESH_AXES

ALL = MESH_AXES  # ("data", "model"): split over all devices

# For `at_rest` below: every kernel, split over all devices. Where a size does not divide, fewer
# devices split it: that changes no number, and the placement report says so. Vectors (biases,
# scales) stay as in use. A convolution in groups (AlexNet's towers) has tower_in for its rows: the
# input channels of one group.
KERNELS = dict(conv_out=ALL, tower_in=ALL, fc1_in=ALL, fc2_in=ALL, fc3_in=ALL)

# A kernel's rows are its inputs, its columns its outputs; those of a convolution are channels.
# Layers follow two rules. A layer takes its input split as its kernel's rows are (fc1_in), and
# returns its output split as its kernel's columns are (fc1_out). Where one layer's output and the
# next layer's input are not split alike, XLA moves the array: that is the communication.
#
#   forward    a gather, where the next layer needs more of an array than a device holds; a sum,
#              where a kernel's rows are split and each device has a partial sum
#   backward   a gather becomes a reduce-scatter of the gradient (on a CPU, an all-reduce); each
#              weight's gradient is summed over the devices that saw other examples and hold the
#              same part of the weight
#
# Activations have one batch axis for each part of the network: the convolutions, the hidden dense
# layers fc1 and fc2, and the output layer fc3. image_height are the rows of images and maps. A
# convolution in groups (AlexNet's towers) has group_in, the channels of its input, and group_out,
# those of its output. If both axes are split, each device works on its own groups, and nothing
# moves. With group_out alone, the input is gathered.
TABLE: dict[str, dict[str, Any]] = {
    # Data parallelism. Each device holds all weights and its shard of the batch. The gradients are
    # summed over all devices.
    "data": dict(conv_batch=ALL, dense_batch=ALL, output_batch=ALL),
    # Model parallelism (pure on a 1xN mesh). The columns of every layer are split over `model`, and
    # the input of every layer is gathered along it.
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
    # The dense layers hold 96% of AlexNet's weights and do 8% of its work at 224x224. Their columns
    # are split. Along `model`, fc1 needs the other devices' examples, and fc2 their columns of its
    # input: XLA gathers both. fc3's rows are split as fc2's columns are, so that fc2's output does
    # not move: devices sum a few logits instead. On 4x2, gradients of convolutions are summed over
    # all 8 devices, those of dense layers over the 4 along `data`.
    "hybrid": dict(
        conv_batch=ALL,
        dense_batch="data",
        output_batch="data",
        fc1_out="model",
        fc2_out="model",
        fc3_in="model",
    ),
    # As hybrid, but fc2 is split by rows: nothing moves between fc1 and fc2 (PaSE, IPDPS 2021;
    # Megatron-LM, 2019). fc2's partial sums are reduce-scattered to a batch that is split over all
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
    # Data parallelism with a split update (Xu et al. 2020, arXiv 2004.13336; like ZeRO-1). Each
    # device keeps and updates one of N shards of the weights and momenta. XLA gathers the weights
    # at the start of a step, and sums the gradients straight into shards: together as many bytes as
    # the all-reduce of `data`.
    "sharded_update": dict(
        conv_batch=ALL,
        dense_batch=ALL,
        output_batch=ALL,
        at_rest=KERNELS,
    ),
    # As sharded_update, one layer at a time (ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054;
    # PyTorch's FSDP). A layer's weights are gathered when its input is there, dropped after use,
    # and gathered again in the backward pass: 1.5 times the bytes, and no device holds all weights
    # at once. With gather_again=False, the backward pass keeps those of the forward pass.
    "fsdp": dict(
        conv_batch=ALL,
        dense_batch=ALL,
        output_batch=ALL,
        at_rest=KERNELS,
        gather_again=True,
    ),
    # One mesh axis splits the rows of a dense kernel, the other its columns. They change places
    # from layer to layer: an output lies as the next layer takes it (PaSE, IPDPS 2021, table II).
    # The dense batch is not split, so no gradient of a dense weight is summed. Each layer sums its
    # outputs along the mesh axis of its rows. Before fc1, devices along `data` give each other
    # features of their examples (Placement.batch_to_features), and XLA then gathers the batch along
    # `model`. conv_batch is not ALL: so devices along `data` hold examples that follow each other,
    # and what a device receives needs no sorting.
    "dense_2d": dict(
        conv_batch=("model", "data"),
        fc1_in="data",
        fc1_out="model",
        fc2_in="model",
        fc2_out="data",
        fc3_in="data",
        fc3_out="model",
    ),
    # Spatial partitioning (Dryden et al. 2019; GSPMD, 2021). The height of images and maps is split
    # over `model`, so that several devices share an example. Windows read rows of the neighbours,
    # which exchange them (sharding/halo.py). Before fc1, the devices along `model` trade rows for
    # examples (an all-to-all), and the dense layers are data parallel over all devices.
    "spatial": dict(conv_batch="data", image_height="model", dense_batch=ALL, output_batch=ALL),
}

# Every logical axis that an array may have. Rows may name any of them.
LOGICAL_AXES = (
    "conv_batch",
    "image_height",
    "dense_batch",
    "output_batch",
    "conv_in",
    "conv_out",
    "group_in",
    "group_out",
    "tower_in",
    "fc1_in",
    "fc1_out",
    "fc2_in",
    "fc2_out",
    "fc3_in",
    "fc3_out",
)

# A size that is not divisible by the devices along its mesh axes is an error, except for these
# logical axes. CIFAR-10's 10 classes are divisible by few mesh sizes, and the output layer is
# small: each device then holds all of it, and the placement report says so.
MAY_REPLICATE = ("fc3_out",)

# Another exception: where the rows of a map do not divide, the last devices hold fewer of them.
MAY_BE_UNEVEN = ("image_height",)
