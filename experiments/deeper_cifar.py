"""Train networks of 2 to 16 layers with weights on CIFAR-10, under one recipe.

  python launch.py --config experiments/deeper_cifar.py:vgg_16               (or another network)

  network           layers  convolutions   parameters   multiply-adds per image
  fully_connected        2             0   12,627,978        12.6 M
  simple_cnn             2             1       82,826         0.9 M
  one_convolution        4             1   33,605,386        35.3 M
  alexnet                8             5   35,855,178       176.3 M
  vgg_8                  8             5   22,834,314        71.1 M
  vgg_11                11             8   28,144,010       133.2 M
  vgg_16                16            13   33,638,218       266.2 M

Multiply-adds leave out the parts of a window that lie on padding. From one_convolution on, all end
in two hidden dense layers of 4096. Accuracies, measured here: results/depth.md, and a plot of them
by `python -m cnn_spmd.papers --depth_plot FILE.svg`.

The recipe is that of alexnet_cifar.py for every network. Its learning rate is the best of .05, .1
and .25 from one_convolution on; for the two shallow networks .1 is better (results/rates.md).
Clipped gradients let even 16 layers start at that rate, without batch norm.

Why convolutions at all: a neuron that sees a whole image of 32x32x3 has 3,072 weights, and 120,000
for 200x200x3. A map of simple_cnn's convolution has 27, at any size.
"""

import ml_collections

from cnn_spmd.errors import UserError
from experiments import alexnet_cifar

VARIANTS = (
    "fully_connected",
    "simple_cnn",
    "one_convolution",
    "alexnet",
    "vgg_8",
    "vgg_11",
    "vgg_16",
)


def get_config(variant: str = "vgg_16") -> ml_collections.ConfigDict:
    """Return the recipe of alexnet_cifar.py with the network that the variant names."""
    if variant not in VARIANTS:
        raise UserError(
            f"experiments/deeper_cifar.py:{variant}: unknown variant, expected one of "
            f"{', '.join(VARIANTS)}"
        )
    config = alexnet_cifar.get_config()
    config.experiment = f"deeper_{variant}"
    config.model.name = variant
    config.data.fallback = ""
    config.parallelism = "data"
    config.eval.every_epochs = 0
    config.checkpoint.every_epochs = 0
    return config
