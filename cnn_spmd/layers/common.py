"""What layers share: initialisers, and the levers that config.model.fast turns on."""

from flax import nnx

HE = (
    nnx.initializers.he_normal()
)  # keeps the variance through a ReLU (He et al. 2015, 1502.01852, eq. 10)

SMALL = nnx.initializers.normal(
    0.01
)  # of AlexNet 2012 (section 5), and of output layers: training starts from even odds

ONES = nnx.initializers.ones

# What makes a step faster and changes nothing but rounding, and which of equal maxima of a pool has the gradient;
# config.model.fast takes all or none. Each is explained where it is used (the cast_once in training/packing.py).
LEVERS = (
    "space_to_depth",
    "pool_first",
    "pool_index",
    "cast_once",
    "column_groups",
    "own_gradients",
)
