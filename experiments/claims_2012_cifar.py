"""What AlexNet's paper (Krizhevsky, Sutskever, Hinton, NIPS 2012) claims of its ideas, on CIFAR-10: each with its control.

  python launch.py --config experiments/claims_2012_cifar.py:base            (or another variant)

  variant               beside  claim
  relu, tanh                    figure 1: a four-layer net reaches 25% training error 6 times sooner; no regularisation, each at
                                the learning rate that makes it fastest
  no_lrn                base    3.3: response norms lower the test error (ImageNet 1.4 points; a CIFAR-10 net 13% -> 11%, for
                                which see cuda_convnet_cifar.py:11pct and :11pct_no_lrn)
  plain_pool            base    3.4: overlapping pools (3 by 2) against plain ones (2 by 2): .4 points
  no_dropout            base    4.2: without it the network overfits substantially
  no_conv2, 3, 4        base    section 7: without a middle layer, some 2 points
  one_tower             base    3.2: two towers against one of half as many maps but in the last layer: 1.7 points

base is AlexNet 2012 scaled to 32x32 (cnn_spmd/models/alexnet_2012_small.py) under the recipe of alexnet_cifar.py with fewer
epochs, a lower rate and gradients as long as they are: no claim is about the recipe. `python -m cnn_spmd.papers` has the table
of the runs in results/claims.

Measured on one H100, n = 3: relu is 1.6 times as fast as tanh, not 6; conv2 is worth three points. Plain pools cost .46 ± .35;
that, and what response norms, dropout, conv3, conv4 and the second tower make, three seeds can't tell from chance on CIFAR-10.

Learning rates of relu and tanh, by `--sweep optimizer.learning_rate=.005,.01,.02,.05,.1 --config.epochs=20`; epochs to 25%
training error, one seed (-: not within 20; results/rates/). tanh takes .03, between the two that tie.

  rate   .005     .01     .02     .05      .1
  relu   11.3     7.5     6.3    14.8       -
  tanh      -    13.6     9.8     9.8    19.6
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
    if variant not in VARIANTS:
        raise UserError(
            f"experiments/claims_2012_cifar.py:{variant}: unknown variant, expected one of {', '.join(VARIANTS)}"
        )
    config = alexnet_cifar.get_config()
    config.experiment = f"claims_2012_{variant}"
    config.data.fallback = ""
    config.parallelism = "data"
    config.eval.every_epochs = config.checkpoint.every_epochs = 0
    config.epochs = 30
    config.model.name = "alexnet_2012_small" + (
        "" if variant in ("base", "no_dropout") else f"_{variant}"
    )
    config.model.dropout = 0.0 if variant == "no_dropout" else 0.5
    config.optimizer.update(dict(learning_rate=0.1, clip_norm=0.0))
    if variant in RATES:
        config.model.update(dict(name=f"four_layers_{variant}", dropout=0.0))
        config.data.update(dict(crop_pad=0, flip=False))
        config.batch_size = 128
        config.label_smoothing = 0.0
        config.optimizer.update(
            dict(
                learning_rate=RATES[variant],
                warmup=0.0,
                decay="constant",
                nesterov=False,
                weight_decay=0.0,
            )
        )
    return config
