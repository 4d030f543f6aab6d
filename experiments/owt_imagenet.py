"""One weird trick (Krizhevsky 2014, arXiv 1404.5997): AlexNet in one tower on ImageNet, batches that grow with the GPUs.

  python launch.py --config experiments/owt_imagenet.py --mesh 1x1,1x2,1x4,1x8 --batch_per_device 128             (128 K, 128 K)
  python launch.py --config experiments/owt_imagenet.py:variable --mesh 1x1,1x2,1x4,1x8 --batch_per_device 128    (128 K, 128)
  ... --config.data.dir=DIR                    JPEG files in DIR/train/CLASS/* and DIR/val/CLASS/*; else TFDS's imagenet2012
  ... --config.data.name=synthetic             random images of that size, for the speed alone
  ... --config experiments/owt_imagenet.py:imagenette --config.data.dir=imagenette2     ten classes; :imagenette,variable too

Each is a sweep over 1 to 8 GPUs, 128 images a GPU: hybrid parallelism, the convolutions data parallel, the dense layers model
parallel over all GPUs. :variable updates the dense layers after each 128 images. Published, ILSVRC-2012 validation, centre
crop, 90 epochs, on up to eight K20 (batch of the convolutions, batch of the dense layers):

  GPUs  batch          top-1 error, %   hours   speedup         GPUs  batch          top-1 error, %   hours   speedup
  1     (128, 128)          42.33       98.05    1              4     (512, 512)          42.59       26.20    3.74
  2     (256, 256)          42.63       50.24    1.95           4     (512, 128)          42.44       26.78    3.66
  2     (256, 128)          42.27       50.90    1.93           8     (1024, 1024)        43.28       15.68    6.25
                                                                8     (1024, 128)         42.86       15.91    6.16

Section 5: momentum .9, weight decay .0005, learning rates times 250^(-1/3) at a quarter, half and three quarters; a batch k
times as large has k times the rate (--config.optimizer.scaling=0.5: sqrt(k), as its theory says). From the released
configuration (cuda-convnet2): rate .01 for batch 128, twice that for biases, colour noise .1, channels 64, 192, 384, 256, 256
(the paper's footnote has 384 for the fourth; its count of parameters fits these). With :variable, each of the k updates that a
dense layer gets in a step has 1/k of the rate.

What differs: a softmax, not 1000 logistic units (so the paper's cross-entropies are not comparable); no response norms; weights
drawn by He et al.'s rule and channels scaled to unit deviation, not the mean image subtracted; biases in the same schedule; and
so a warm-up over the first twentieth of the steps (the quarters are those of the rest), without which the loss of a batch of
512 was not finite by the seventh step (:imagenette, three seeds; not kept).

Measured, H200s, random images, 220 steps, speedup over one GPU; with :variable each GPU updates its share of the dense layers
once for every GPU there is. The first of two figures is from before the warm-up; (512, 512) and its 2.01 ran at a rate of .001,
as eleven steps of warm-up are too few for 512 images at .04. The speed depends on neither.

  GPUs  batch          speedup          GPUs  batch          speedup
  2     (256, 256)     1.93, 2.01       2     (256, 128)     1.67, 1.72     (two machines)
  4     (512, 512)     3.92             4     (512, 128)     2.75

Not measured: ImageNet's errors and hours, more GPUs.

Measured, :imagenette, 1 x H200 (--mesh 1x1 --config.batch_size=512), error on the 3,925 test images, centre crop (of files
whose shorter side was 224), n = 3 each:

  (128, 128)   18.22 ± 0.29 %       (512, 512)   26.11 ± 1.93 %       (512, 128)   21.31 ± 0.81 %

What is not set here is as in experiments/alexnet_cifar.py.
"""

import ml_collections

from cnn_spmd.errors import UserError
from experiments import alexnet_cifar


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    variants = variant.split(",") if variant else []
    if not {*variants} <= {"variable", "imagenette"}:
        raise UserError(
            f"experiments/owt_imagenet.py:{variant}: unknown variant, expected variable, imagenette or both, with "
            "a comma between"
        )
    data = "imagenette" if "imagenette" in variants else "imagenet2012"
    config = alexnet_cifar.get_config()
    config.experiment = f"owt_{data.removesuffix('2012')}" + "_variable" * ("variable" in variants)
    config.data.update(
        dict(name=data, fallback="", image_size=256, crop=224, crop_pad=0, colour_noise=0.1)
    )
    config.data.synthetic.update(
        dict(image_size=256, classes=1000, train_examples=8192, test_examples=1024)
    )
    config.model.dropout = 0.5
    config.parallelism = "hybrid"
    config.batch_size = 128
    config.dense_microbatch = 128 if "variable" in variants else 0
    config.epochs = 90
    config.label_smoothing = 0.0
    config.optimizer.update(
        dict(
            learning_rate=0.01,
            clip_norm=0.0,
            scaling=1.0,
            bias_rate=2.0,
            warmup=0.05,
            decay="staged",
            stages=(0.25, 0.5, 0.75),
            stage_factor=250 ** (-1 / 3),
            momentum=0.9,
            nesterov=False,
            weight_decay=5e-4,
        )
    )
    config.eval.update(dict(every_epochs=5, views="one"))
    config.checkpoint.every_epochs = 5
    return config
