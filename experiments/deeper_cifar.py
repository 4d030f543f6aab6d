"""Deeper is better? CIFAR-10 by networks of 1 to 16 layers with weights, all under one recipe.

  python launch.py --config experiments/deeper_cifar.py:vgg_16               (or another network)

  network           layers  convolutions   parameters   multiply-adds an image   test accuracy, one H100
  fully_connected        2             0   12,627,978       12.6 M                56.94 ± 0.02 %   n = 3
  simple_cnn             2             1       82,826        1.0 M                69.60 ± 0.36 %   n = 3
  one_convolution        4             1   33,605,386       35.3 M                72.99 ± 0.62 %   n = 3
  alexnet                8             5   35,855,178      176.4 M                83.08 ± 0.65 %   n = 3
  vgg_8                  8             5   22,834,314       71.2 M                82.39 ± 0.52 %   n = 3
  vgg_11                11             8   28,144,010      133.3 M                82.55 ± 0.43 %   n = 3
  vgg_16                16            13   33,638,218      266.5 M                83.16 ± 0.22 %   n = 2

From one_convolution on all end in two hidden dense layers of 4096 and have 23 to 36 million parameters. The recipe is that of
alexnet_cifar.py with fewer epochs and a fifth of its rate, for 16 layers without batch norm. That is slow for all: AlexNet by
its own recipe reaches 91.9%. Five convolutions are worth ten points over one; from 5 to 13 nothing is gained under this recipe.
(vgg_16's seed 1 was interrupted at two thirds, and is not counted.)
`python -m cnn_spmd.papers --depth_plot FILE.svg` draws the table.

Why convolutions at all: a neuron that sees a whole image of 32x32x3 has 3,072 weights, of 200x200x3 120,000; a map of
simple_cnn's has 27, at any size.
"""

import ml_collections

from experiments import alexnet_cifar

VARIANTS = ("fully_connected", "simple_cnn", "one_convolution", "alexnet", "vgg_8", "vgg_11", "vgg_16")


def get_config(variant: str = "vgg_16") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"experiments/deeper_cifar.py:{variant}: unknown variant, expected one of {', '.join(VARIANTS)}")
    config = alexnet_cifar.get_config()
    config.experiment = f"deeper_{variant}"
    config.model.name = variant
    config.data.fallback = ""
    config.parallelism = "data"
    config.eval.every_epochs = config.checkpoint.every_epochs = 0
    return config
