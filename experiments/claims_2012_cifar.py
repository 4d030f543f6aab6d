"""Test what AlexNet's paper (NIPS 2012) claims of its ideas, on CIFAR-10.

Each idea has a variant without it, beside a control that has it.

  python launch.py --config experiments/claims_2012_cifar.py:base            (or another variant)

  variant               beside  claim (section: published)
  relu, tanh                    figure 1: with ReLU a four-layer net reaches 25% training error 6
                                times sooner; no regularisation, each at its fastest learning rate
  no_lrn                base    3.3: response norms lower the test error by 1.4 points on ImageNet;
                                on a CIFAR-10 net from 13% to 11%, for which see
                                cuda_convnet_cifar.py:11pct and :11pct_no_lrn
  plain_pool            base    3.4: pools that overlap (3 by 2, not 2 by 2): 0.4 points
  no_dropout            base    4.2: without dropout the network overfits substantially
  no_conv2, 3, 4        base    7: without a middle layer, about 2 points are lost
  one_tower             base    3.2: two towers gain 1.7 points over one tower with half as many
                                maps, in which only the last convolution keeps its size

base is AlexNet 2012 scaled to 32x32 (cnn_spmd/models/alexnet_2012_small.py). Its recipe is that of
alexnet_cifar.py with fewer epochs, a lower rate and no clipping: no claim is about the recipe. What
was measured: results/papers.md, which `python -m cnn_spmd.papers` prints.

The learning rates of relu and tanh are the fastest of `--sweep
optimizer.learning_rate=.005,.01,.02,.05,.1 --config.epochs=20` (results/rates.md). For tanh two
rates tie; it takes one between them.
"""

import ml_collections

from cnn_spmd.errors import UserError
from experiments import alexnet_cifar

VARIANTS = (
    "base",
    "no_lrn",
    "plain_pool",
    "no_dropout",
    "no_conv2",
    "no_conv3",
    "no_conv4",
    "one_tower",
    "relu",
    "tanh",
)
RATES = {"relu": 0.02, "tanh": 0.03}


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    """Return the recipe of alexnet_cifar.py with the variant's changes."""
    if variant not in VARIANTS:
        raise UserError(
            f"experiments/claims_2012_cifar.py:{variant}: unknown variant, expected one of "
            f"{', '.join(VARIANTS)}"
        )
    config = alexnet_cifar.get_config()
    config.experiment = f"claims_2012_{variant}"
    config.data.fallback = ""
    config.parallelism = "data"
    config.epochs = 30
    config.optimizer.update(learning_rate=0.1, clip_norm=0.0)
    config.eval.every_epochs = 0
    config.checkpoint.every_epochs = 0
    if variant in RATES:
        config.model.update(name=f"four_layers_{variant}", dropout=0.0)
        config.data.update(crop_pad=0, flip=False)
        config.batch_size = 128
        config.label_smoothing = 0.0
        config.optimizer.update(
            learning_rate=RATES[variant],
            warmup=0.0,
            decay="constant",
            nesterov=False,
            weight_decay=0.0,
        )
        return config
    suffix = "" if variant in ("base", "no_dropout") else f"_{variant}"
    config.model.name = f"alexnet_2012_small{suffix}"
    config.model.dropout = 0.0 if variant == "no_dropout" else 0.5
    return config
