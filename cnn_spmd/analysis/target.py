"""Describe GPUs that are not in this machine, for dry runs to compile for.

XLA's compiler needs a description of the card, not the card. It comes with jax[cuda12]
(pip install -e '.[cuda12]'). Training does not use this module.
"""

from collections.abc import Sequence

import jax
from jax.experimental import topologies

from cnn_spmd.config import MOST_CPU_DEVICES
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh

# A stream_executor.GpuTargetConfigProto per card, with NVIDIA's numbers as XLA has them in
# xla/backends/gpu/target_config/specs/h100_sxm.txtpb.
CARDS = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}


def parse(text: str, cards: Sequence[str] = tuple(CARDS), advice: str = "") -> tuple[str, int, int]:
    """Return the card, the hosts and the GPUs per host of CARD:HOSTSxGPUS, such as h100:64x8.

    Raises UserError for another spelling, and for a card that is not one of `cards`. advice: what
    the message adds for other cards.
    """
    card, _, topology = text.partition(":")
    sizes = mesh.sizes_in(topology, 2)
    if card not in cards or not sizes:
        raise UserError(
            f"--target={text}: expected CARD:HOSTSxGPUS with a card of {', '.join(cards)}, such as "
            f"h100:64x8, and at most {mesh.MOST_DEVICES} GPUs{advice}"
        )
    return card, *sizes


def devices(text: str) -> list[jax.Device]:
    """Return the devices of CARD:HOSTSxGPUS.

    Programs can be compiled for them, and cannot run on them.
    Raises UserError as `parse` does, and where jax[cuda12] is missing.
    """
    card, hosts, gpus_per_host = parse(text)
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=card,
            topology=f"1x{hosts}x{gpus_per_host}",
            target_config=CARDS[card],
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        count = hosts * gpus_per_host
        simulate = ""
        if count <= MOST_CPU_DEVICES:
            simulate = f", or compile for the CPU with --cpu_devices={count}"
        raise UserError(
            f"--target={text}: there is no compiler for it ({reason}): "
            f"pip install -e '.[cuda12]'{simulate}"
        ) from None
    return list(description.devices)
