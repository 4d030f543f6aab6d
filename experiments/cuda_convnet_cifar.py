"""cuda-convnet's five CIFAR-10 nets (Krizhevsky 2011), layer for layer and step for step as its example-layers/*.cfg say.

  python launch.py --config experiments/cuda_convnet_cifar.py:80sec          (or :19pct, :18pct, :13pct, :11pct, :11pct_no_lrn)

Published test error, on one GTX 580, and the steps: epochs are of 50,000 images, but of 40,000 where batch 5 was held out.

  80sec   26%     80 s     8 epochs, and 2 at a tenth of the rates (how many is not said; the time leaves room for 2)
  19pct   19%     20 min   no schedule is given: that of 18pct, whose time is the same
  18pct   18%     20 min   120 epochs, 10 at a tenth, 10 at a hundredth
  13pct   12.6%   22 min   100 epochs of batches 1 to 4, 40 of all, 10 at a tenth, 10 at a hundredth; ten test views
  11pct   11%     75 min   350 epochs of batches 1 to 4, 150 of all, 10 at a tenth, 10 at a hundredth; ten test views

From 13% to 11% there are response norms, but a wider local layer, another decay and three times the epochs, too. The published
pair is no ablation; :11pct against :11pct_no_lrn, which differ in the response norms alone, is one.

What differs: images are shuffled across the five batches in each epoch, and its last incomplete batch of 128 is left out.

Measured on the real CIFAR-10, all 10,000 test images, float32, 1 x H100; mean of n seeds ± one sample deviation (results/):

  80sec          25.15 ± 0.26 %   n = 3     1.5 s of training
  19pct          18.84 ± 0.19 %   n = 3    20.3 s
  18pct          17.91 ± 0.24 %   n = 3    23.7 s
  13pct          12.52 ± 0.15 %   n = 3    20.4 s
  11pct          11.31 ± 0.20 %   n = 3    79.2 s
  11pct_no_lrn   11.31 ± 0.41 %   n = 3    63.4 s

Without its response norms 11pct is no worse than with them, within the spread of three runs: what brings 13% to 11% here are
the other changes. (Most runs are from before some of today's faster forms of layers; 11pct's first seed took 85 s, before the
norms' derivative was written by hand, the others 76 s. The last one of 11pct_no_lrn ran on an H200, 10.97 % in 57 s, so that
only two pairs are of one card: README.md.)
"""

import ml_collections

from cnn_spmd.errors import UserError
from experiments import alexnet_cifar

BATCH, IMAGES = 128, 50_000
EPOCH, SHORT_EPOCH = (
    IMAGES // BATCH,
    IMAGES * 4 // 5 // BATCH,
)  # steps; the short one leaves out batch 5

# Variant: steps at the full rates, of them the first so many without batch 5; steps at a tenth, and at a hundredth; weight
# decay by layer (the others have .004).
RECIPES = {
    "80sec": (8 * EPOCH, 0, 2 * EPOCH, 0, dict(fc1=0.03, fc3=0.03)),
    "19pct": (120 * EPOCH, 0, 10 * EPOCH, 10 * EPOCH, dict(fc3=3.0)),
    "18pct": (120 * EPOCH, 0, 10 * EPOCH, 10 * EPOCH, dict(fc3=1.0)),
    "13pct": (
        100 * SHORT_EPOCH + 40 * EPOCH,
        100 * SHORT_EPOCH,
        10 * EPOCH,
        10 * EPOCH,
        dict(conv1=0.0, conv2=0.0),
    ),
    "11pct": (
        350 * SHORT_EPOCH + 150 * EPOCH,
        350 * SHORT_EPOCH,
        10 * EPOCH,
        10 * EPOCH,
        dict(conv1=0.0, conv2=0.0, fc3=0.01),
    ),
}
RECIPES["11pct_no_lrn"] = RECIPES["11pct"]


def get_config(variant: str = "80sec") -> ml_collections.ConfigDict:
    if variant not in RECIPES:
        raise UserError(
            f"experiments/cuda_convnet_cifar.py:{variant}: unknown variant, expected one of {', '.join(RECIPES)}"
        )
    full, short, tenth, hundredth, decays = RECIPES[variant]
    steps = full + tenth + hundredth
    config = alexnet_cifar.get_config()
    config.experiment = f"cuda_convnet_{variant}"
    config.model.update(dict(name=f"cuda_convnet_{variant}", dropout=0.0))
    config.data.update(dict(fallback="", crop_pad=0, flip=False, normalise="pixel_mean"))
    config.parallelism = "data"
    config.dtype = "float32"
    config.batch_size = BATCH
    config.epochs, config.steps = 0, steps
    config.label_smoothing = 0.0
    config.optimizer.update(
        dict(
            learning_rate=0.001,
            bias_rate=2.0,
            momentum=0.9,
            nesterov=False,
            weight_decay=0.004,
            weight_decays=decays,
            clip_norm=0.0,
            warmup=0.0,
            decay="staged",
            stage_factor=0.1,
            stages=tuple(at / steps for at in (full, full + tenth) if at < steps),
        )
    )
    config.eval.update(dict(every_epochs=0, views="one"))
    config.checkpoint.every_epochs = 0
    if (
        "conv1" in decays
    ):  # the nets with local layers see random crops, mirrored at random, and are tested on ten
        config.data.update(dict(crop=24, flip=True, held_out=IMAGES // 5, held_out_steps=short))
        config.eval.views = "ten"
    return config
