"""The deeper the better? CIFAR-10 by networks of 2 to 16 layers with weights, all under one recipe.

  python launch.py --config experiments/deeper_cifar.py:vgg_16               (or another network)

  network           layers  convolutions   parameters   multiply-adds an image   test accuracy, one H200
  fully_connected        2             0   12,627,978       12.6 M                60.03 ± 0.15 %   n = 3
  simple_cnn             2             1       82,826        0.9 M                69.72 ± 0.09 %   n = 3
  one_convolution        4             1   33,605,386       35.3 M                82.29 ± 0.29 %   n = 3
  alexnet                8             5   35,855,178      176.3 M                91.78 ± 0.08 %   n = 3
  vgg_8                  8             5   22,834,314       71.1 M                90.92 ± 0.06 %   n = 3
  vgg_11                11             8   28,144,010      133.2 M                91.58 ± 0.14 %   n = 3
  vgg_16                16            13   33,638,218      266.2 M                92.53 ± 0.13 %   n = 3

Multiply-adds leave out the taps of a window that lie on padding. From one_convolution on all end in two hidden dense layers of
4096 and have 23 to 36 million parameters. The recipe is that of alexnet_cifar.py for every network. Its rate, .25, is the best
of .05, .1 and .25 from one_convolution on (seed 9); for the two shallow ones .1 is better, by 0.6 (seed 9) and 1.1 points
(three seeds; results/rates/deeper_cifar.json). Gradients no longer than 1 let even 16 layers start at it, without batch norm.
`python -m cnn_spmd.papers --depth_plot FILE.svg` draws the table.

Why convolutions at all: a neuron that sees a whole image of 32x32x3 has 3,072 weights, of 200x200x3 120,000; a map of
simple_cnn's has 27, at any size.
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
    if variant not in VARIANTS:
        raise UserError(
            f"experiments/deeper_cifar.py:{variant}: unknown variant, expected one of {', '.join(VARIANTS)}"
        )
    config = alexnet_cifar.get_config()
    config.experiment = f"deeper_{variant}"
    config.model.name = variant
    config.data.fallback = ""
    config.parallelism = "data"
    config.eval.every_epochs = config.checkpoint.every_epochs = 0
    return config
