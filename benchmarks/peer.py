"""Time PyTorch's training step of the same AlexNet.

  python benchmarks/peer.py --batch 512

Needs torch (pip install torch) and an NVIDIA GPU. With several GPUs it trains data parallel, with
DDP or FSDP2:
  torchrun --nproc-per-node 4 benchmarks/peer.py --batch 128 --mode max --bf16_grads
  torchrun --nproc-per-node 4 benchmarks/peer.py --batch 128 --fsdp

It uses channels_last (with FSDP2 for the images alone), bfloat16 autocast, fused SGD, cuDNN's
autotuner, and TF32 for what stays float32. The loss is compiled with the network. The images lie on
the GPU, ready to use, and are the same in each step.

CUDA events measure 400 steps, 3 times, after 8 steps of warm-up, which compile. The mode `capture`
captures the compiled step, with update and all-reduces, in one CUDA graph and replays it. Prints
one line of JSON.
"""

import argparse
import json
import math
import os
from collections.abc import Callable

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

WARMUP = 8
CAPTURE_WARMUP = 11  # DDP builds its buckets anew in its first steps; its manual asks for 11
REPEATS = 3
STEPS = 400
CLASSES = 1000
SIDE = 224
COMPILERS = {
    "eager": lambda net: net,
    "compile": torch.compile,
    "graphs": lambda net: torch.compile(net, mode="reduce-overhead"),
    "max": lambda net: torch.compile(net, mode="max-autotune"),
    "capture": torch.compile,
}


class AlexNet(nn.Sequential):
    """torchvision's layers, 61,100,840 parameters; returns the mean cross-entropy."""

    def __init__(self):
        def conv(*sizes: int, **window: int) -> tuple[nn.Module, ...]:
            return nn.Conv2d(*sizes, **window), nn.ReLU(inplace=True)

        def dense(*sizes: int) -> tuple[nn.Module, ...]:
            return nn.Dropout(0.5), nn.Linear(*sizes), nn.ReLU(inplace=True)

        super().__init__(
            *conv(3, 64, 11, stride=4, padding=2),
            nn.MaxPool2d(3, 2),
            *conv(64, 192, 5, padding=2),
            nn.MaxPool2d(3, 2),
            *conv(192, 384, 3, padding=1),
            *conv(384, 256, 3, padding=1),
            *conv(256, 256, 3, padding=1),
            nn.MaxPool2d(3, 2),
            nn.Flatten(),
            *dense(9216, 4096),
            *dense(4096, 4096),
            nn.Linear(4096, CLASSES),
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy []."""
        return nn.functional.cross_entropy(super().forward(images), labels)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, required=True, help="images per GPU")
    parser.add_argument(
        "--mode",
        choices=COMPILERS,
        default="compile",
        help="graphs: torch.compile with CUDA graphs (reduce-overhead); max: with max-autotune; "
        "capture: the whole compiled step in one CUDA graph",
    )
    parser.add_argument("--bf16_grads", action="store_true", help="send gradients as bfloat16")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    return parser.parse_args()


def distribute(net: AlexNet, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return the network under DDP, or under FSDP2, which shards each dense layer by itself."""
    distributed.init_process_group("nccl")
    if args.fsdp:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.bfloat16 if args.bf16_grads else torch.float32,
        )
        for layer in [*filter(lambda layer: isinstance(layer, nn.Linear), net), net]:
            fully_shard(layer, mp_policy=policy)
        return net
    with torch.cuda.stream(torch.cuda.Stream()):  # a capture needs DDP to be made on a side stream
        net = nn.parallel.DistributedDataParallel(
            net, device_ids=[device.index], gradient_as_bucket_view=True
        )
    if args.bf16_grads:
        net.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return net


def capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a function that replays the step, captured in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def make_training(
    args: argparse.Namespace, device: torch.device, gpus: int
) -> Callable[[int], torch.Tensor]:
    """Return a function that trains for some steps and returns the last loss."""
    torch.manual_seed(0)
    net = AlexNet().to(device)
    if not args.fsdp:  # FSDP2 does not take parameters in that order
        net = net.to(memory_format=torch.channels_last)
    if gpus > 1:
        net = distribute(net, args, device)
    # PyTorch has no fused SGD for FSDP2's sharded parameters.
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=not args.fsdp
    )
    net = COMPILERS[args.mode](net)
    images = torch.randn(args.batch, 3, SIDE, SIDE, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(CLASSES, (args.batch,), device=device)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if args.mode == "capture":
        step = capture(step)

    def train(steps: int) -> torch.Tensor:
        for _ in range(steps):
            loss = step()
        return loss

    return train


def measure(train: Callable[[int], torch.Tensor]) -> tuple[list[float], float]:
    """Return milliseconds per step, REPEATS times, and the last loss."""
    train(WARMUP)
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        loss = train(STEPS)
        end.record()
        torch.cuda.synchronize()
        times.append(round(start.elapsed_time(end) / STEPS, 4))
    loss = float(loss)
    if not math.isfinite(loss):
        raise ArithmeticError(f"loss is {loss}")
    return times, loss


def main() -> None:
    """Time the step; the first process prints one line of JSON."""
    args = parse_arguments()
    gpus = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    times, loss = measure(make_training(args, device, gpus))
    if int(os.environ.get("RANK", 0)) == 0:
        result = dict(
            mode=args.mode,
            bf16_grads=args.bf16_grads,
            fsdp=args.fsdp,
            gpus=gpus,
            batch_per_gpu=args.batch,
            steps=STEPS,
            step_milliseconds=times,
            loss=round(loss, 4),
            versions=dict(
                torch=torch.__version__,
                cuda=torch.version.cuda,
                cudnn=torch.backends.cudnn.version(),
            ),
        )
        print(json.dumps(result), flush=True)
    if gpus > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
