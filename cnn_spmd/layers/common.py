"""Define what layers share: initialisers, the plain convolution, the fast forms.

A layer has one reference form, which is short, and may have fast forms (layers/fast_*.py and
layers/kernels.py). A fast form computes the same numbers up to rounding. Where maxima in a pool are
equal, it may give the gradient to another one. Users choose with `config.model.fast`: all or none.
"""

import jax
from flax import nnx

# Keeps the variance through a ReLU: He et al. 2015 (1502.01852), equation 10.
HE = nnx.initializers.he_normal()

# AlexNet 2012, section 5. Also for output layers: training then starts with equal probabilities.
NORMAL_0_01 = nnx.initializers.normal(0.01)

ONES = nnx.initializers.ones

# The fast forms by name. An argument `fast_forms` is a tuple of some of these names: the forms that
# a layer may use. A run uses all of them, or none; tests and benchmarks/ also try them one by one.
FAST_FORMS = (
    # Convolve blocks of pixels as channels: layers/fast_conv.py.
    "space_to_depth",
    # Add the bias and apply the ReLU after the max pool, not before it: layers/conv.py.
    "pool_first",
    # Keep where each maximum of a pool was, in one byte: layers/fast_pool.py.
    "pool_index",
    # Let the update write the next step's bfloat16 weights: training/step.py.
    "carry_bf16",
    # Convolve several columns of the map at once: layers/fast_conv.py.
    "column_groups",
    # Use gradients that keep less memory than autodiff's: layers/activation.py, layers/norm.py.
    "own_gradients",
)


def convolve(
    x_NHWC: jax.Array, kernel_HWIO: jax.Array, padding, strides: tuple[int, int] = (1, 1)
) -> jax.Array:
    """Return the convolution of x_NHWC with kernel_HWIO, without a bias.

    padding: zeros before and after, for height and width: [(low, high), (low, high)], or "VALID".
    """
    return jax.lax.conv_general_dilated(
        x_NHWC, kernel_HWIO, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
