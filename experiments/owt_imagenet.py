"""Train AlexNet on ImageNet by one weird trick (Krizhevsky 2014, arXiv 1404.5997).

  python launch.py --config experiments/owt_imagenet.py --mesh 1x1,1x2,1x4,1x8
      --batch_per_device 128                      a batch that grows with the GPUs: (128 K, 128 K)
  python launch.py --config experiments/owt_imagenet.py:variable --mesh 1x1,1x2,1x4,1x8
      --batch_per_device 128                      the dense layers' batch does not: (128 K, 128)
  ... --config.data.dir=DIR               JPEG files in DIR/train/CLASS/* and DIR/val/CLASS/*;
                                          without it TFDS's imagenet2012
  ... --config.data.name=synthetic        random images of that size, for the speed alone
  ... --config experiments/owt_imagenet.py:imagenette --config.data.dir=imagenette2
                                          ten of the classes; :imagenette,variable too

Each is a sweep over 1 to 8 GPUs with 128 images per GPU under hybrid parallelism: convolutions data
parallel, dense layers model parallel. :variable updates the dense layers after each 128 images.
Under --config.parallelism=one_sum, a row of this file, devices then wait less for each other.

Published, ILSVRC-2012 validation, centre crop, 90 epochs, on up to eight K20 (batch of the
convolutions, batch of the dense layers):

  GPUs  batch          top-1 error, %   hours   speedup
  1     (128, 128)          42.33       98.05    1
  2     (256, 256)          42.63       50.24    1.95
  2     (256, 128)          42.27       50.90    1.93
  4     (512, 512)          42.59       26.20    3.74
  4     (512, 128)          42.44       26.78    3.66
  8     (1024, 1024)        43.28       15.68    6.25
  8     (1024, 128)         42.86       15.91    6.16

What was measured here, which is :imagenette and the speed on random images: results/papers.md and
results/meshes.md.

The recipe is section 5's: momentum 0.9, weight decay 0.0005, rates times 250^(-1/3) at a quarter,
half and three quarters of the steps. A batch k times as large as 128 has k times the rate
(--config.optimizer.scaling=0.5: sqrt(k), as the paper's theory says). cuda-convnet2's configuration
adds: rate 0.01 for batch 128, twice that for biases, colour noise 0.1, and channels 64, 192, 384,
256, 256 (the paper's footnote has 384 for the fourth; its count of parameters fits these). With
:variable, each of the k updates per step of a dense layer has 1/k of the rate.

What differs from the paper:
- A softmax, not 1000 logistic units: the paper's cross-entropies are not comparable.
- Weights drawn by He et al.'s rule; no response norms; biases follow the same schedule.
- Channels scaled to unit deviation, where the paper subtracts the mean image.
- Therefore a warm-up over the first twentieth of the steps: without it the loss at a batch of 512
  was not finite within ten steps. The quarters are those of the other steps.
"""

import ml_collections

import cnn_spmd.config
from cnn_spmd.errors import UserError


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return what differs from the defaults (docs/config.md), within all of them."""
    variants = variant.split(",") if variant else []
    if not {*variants} <= {"variable", "imagenette"}:
        raise UserError(
            f"experiments/owt_imagenet.py:{variant}: unknown variant, expected variable, "
            "imagenette or both, with a comma between"
        )
    variable = "variable" in variants
    data = "imagenette" if "imagenette" in variants else "imagenet2012"
    config = cnn_spmd.config.default()
    config.experiment = f"owt_{data.removesuffix('2012')}" + "_variable" * variable
    config.model.update(name="alexnet", dropout=0.5)
    config.data.update(name=data, image_size=256, crop=224, flip=True, colour_noise=0.1)
    config.data.synthetic.update(
        image_size=256, classes=1000, train_examples=8192, test_examples=1024
    )
    config.parallelism = "hybrid"
    # As hybrid_alternating, but each device computes the output layer for all examples. So devices
    # wait for each other once per micro-batch: for the sum of fc2's output.
    config.placement = dict(one_sum=dict(base="hybrid_alternating", output_batch="data"))
    config.batch_size = 128
    config.dense_microbatch = 128 if variable else 0
    config.epochs = 90
    config.optimizer.update(
        learning_rate=0.01,
        scaling=1.0,
        bias_rate=2.0,
        warmup=0.05,
        decay="staged",
        stages=(0.25, 0.5, 0.75),
        stage_factor=250 ** (-1 / 3),
        momentum=0.9,
        weight_decay=5e-4,
    )
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 5
    return config
