"""Measure what larger batches cost in accuracy, on CIFAR-10.

  python launch.py --config experiments/owt_cifar.py --sweep batch_size=128,256,512,1024
      --sweep seed=0,1,2
  python launch.py --config experiments/owt_cifar.py:variable --sweep batch_size=256,512,1024
      --sweep seed=0,1,2
  ... --config.optimizer.scaling=0.5              the same with the square root of k

The question is that of section 5 of One weird trick (Krizhevsky 2014, arXiv 1404.5997). A batch k
times as large as 128 has k times the learning rate (scaling=1.0), which the paper found to work.
Its theory says sqrt(k) times (scaling=0.5). :variable updates the dense layers after each 128
images, at 1/k of the rate. The recipe is that of owt_imagenet.py, with the data and the network of
alexnet_cifar.py.

Published, ILSVRC-2012, top-1 error in %, rate times k:

  batch                                     128      256      512     1024
  batch of the dense layers as large      42.33    42.63    42.59    43.28
  batch of the dense layers 128           42.33    42.27    42.44    42.86

What was measured on CIFAR-10: results/batches.md. Two choices come from trials before that: with
fewer epochs (20) no batch is trained to its end, and without a warm-up a rate times k diverges at
batch 1024.
"""

import ml_collections

from cnn_spmd.errors import UserError
from experiments import alexnet_cifar, owt_imagenet


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the recipe of owt_imagenet.py on the images of alexnet_cifar.py."""
    if variant not in ("", "variable"):
        raise UserError(
            f"experiments/owt_cifar.py:{variant}: unknown variant, expected variable or none"
        )
    config = owt_imagenet.get_config(variant)
    config.experiment = "owt_cifar" + (f"_{variant}" if variant else "")
    config.data = alexnet_cifar.get_config().data
    config.data.fallback = ""
    config.epochs = 60
    config.eval.every_epochs = 0
    config.checkpoint.every_epochs = 0
    return config
