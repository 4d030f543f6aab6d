"""Train the residual networks of He et al. 2015 on CIFAR-10, and the plain ones beside them.

"Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2.

  python launch.py --config experiments/resnet_cifar.py:20               (or another variant)
  python launch.py --config experiments/resnet_cifar.py:plain_20

Published test error, table 6. The paper shows the plain networks in figure 6 only: the deeper they
are, the larger is their error.

  variants            parameters   error of the residual network, %
  20, plain_20           269,722     8.75
  32, plain_32           464,154     7.51
  44, plain_44           658,586     7.17
  56, plain_56           853,018     6.97
  110                  1,727,962     6.43, the best of five; their mean is 6.61

The recipe is the paper's: batch 128; rate .1, divided by 10 after 32,000 and after 48,000 of 64,000
steps; momentum .9; weight decay .0001 of all parameters; images less the mean image, padded by 4,
cropped and mirrored at random; weights drawn by He et al.'s rule; one view of a test image.

What differs from the paper:
- All 50,000 images are trained on. The paper held out 5,000 to choose its schedule.
- Pads are reflected pixels, not zeros.
- All variants train their first 400 steps at a rate of .01. The paper does so for :110 alone, until
  the training error is below 80%, which took about as long. Without these steps the loss first
  rises.

What was measured: results/depth.md.
"""

import ml_collections

import cnn_spmd.config
from cnn_spmd.errors import UserError

VARIANTS = ("20", "32", "44", "56", "110", "plain_20", "plain_32", "plain_44", "plain_56")
STEPS = 64_000
DROPS = (32_000, 48_000)
WARMUP = 400


def get_config(variant: str = "20") -> ml_collections.ConfigDict:
    """Return what differs from the defaults (docs/config.md), within all of them."""
    if variant not in VARIANTS:
        raise UserError(
            f"experiments/resnet_cifar.py:{variant}: unknown variant, expected one of "
            f"{', '.join(VARIANTS)}"
        )
    config = cnn_spmd.config.default()
    config.experiment = f"resnet_cifar_{variant}"
    config.model.name = variant if variant.startswith("plain") else f"resnet_{variant}"
    config.data.update(normalise="pixel_mean", crop_pad=4, flip=True)
    config.batch_size = 128
    config.epochs = 0
    config.steps = STEPS
    config.optimizer.update(
        learning_rate=0.1,
        warmup_steps=WARMUP,
        warmup_factor=0.1,
        decay="staged",
        stages=tuple((drop - WARMUP) / (STEPS - WARMUP) for drop in DROPS),
        stage_factor=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        decay_all=True,
    )
    return config
