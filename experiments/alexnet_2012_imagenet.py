"""AlexNet as published (Krizhevsky, Sutskever, Hinton, NIPS 2012): two towers on the model axis, the paper's recipe.

  python launch.py --config experiments/alexnet_2012_imagenet.py                 two GPUs, a tower each, as in 2012
  python launch.py --config experiments/alexnet_2012_imagenet.py --mesh 1x1      one GPU, the same numbers

Published, ILSVRC-2012 validation, ten crops: 40.7% top-1 and 18.2% top-5 error, after some 90 epochs in five to six days on two
GTX 580. Section 5: batch 128, learning rate .01 divided by ten three times (when the validation error stood still; here at a
quarter, half and three quarters), momentum .9, weight decay .0005. Whether biases decay is not said; here they do not.

No data set of ImageNet's size is wired up yet: the images are random, of its size and number of classes, for placement and
speed. Nothing is measured with it so far. What is not set here is as in experiments/alexnet_cifar.py.
"""

import ml_collections

from experiments import alexnet_cifar


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"experiments/alexnet_2012_imagenet.py:{variant}: unknown variant, there is none but the plain one")
    config = alexnet_cifar.get_config()
    config.experiment = "alexnet_2012_imagenet"
    config.model.name = "alexnet_2012"
    config.data.update(dict(name="synthetic", fallback="", crop_pad=0))
    config.data.synthetic.update(dict(image_size=224, classes=1000, train_examples=8192, test_examples=1024))
    config.mesh.update(dict(data=-1, model=2))
    config.parallelism = "two_tower"
    config.batch_size = 128
    config.epochs = 90
    config.label_smoothing = 0.0
    config.optimizer.update(dict(learning_rate=0.01, warmup=0.0, decay="staged", stages=(0.25, 0.5, 0.75), stage_factor=0.1,
                                 momentum=0.9, nesterov=False, weight_decay=5e-4))
    config.eval.views = "one"
    return config
