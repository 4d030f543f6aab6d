"""Deeper is better? CIFAR-10 by networks of 1 to 16 layers with weights, all under one recipe.

  python launch.py --config experiments/deeper_cifar.py:vgg_16               (or another network)

  network           layers  convolutions   parameters   multiply-adds an image
  fully_connected        2             0   12,627,978       12.6 M
  simple_cnn             2             1       82,826        1.0 M
  one_convolution        4             1   33,605,386       35.3 M
  alexnet                8             5   35,855,178      176.4 M
  vgg_8                  8             5   22,834,314       71.2 M
  vgg_11                11             8   28,144,010      133.3 M
  vgg_16                16            13   33,638,218      266.5 M

From one_convolution on all end in two hidden dense layers of 4096 and have 23 to 36 million parameters. The recipe is that of
alexnet_cifar.py with fewer epochs and a lower rate: 16 layers without batch norm need it.

Not measured yet. `python -m cnn_spmd.papers` has the table of the runs in results/claims.

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
    config.model.update(dict(name=variant, dropout=0.5))
    config.data.fallback = ""
    config.parallelism = "data"
    config.eval.every_epochs = config.checkpoint.every_epochs = 0
    config.epochs = 30
    config.optimizer.learning_rate = 0.05
    return config
