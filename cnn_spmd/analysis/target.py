"""GPUs that are not here, for a dry run: the compiler needs a description of the card, not the card.

Needs jax[cuda12] installed (requirements.txt). Not in use while training.
"""

import math

import jax
from jax.experimental import topologies

from cnn_spmd.config import MOST_CPU_DEVICES
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh

# stream_executor.GpuTargetConfigProto. The figures are NVIDIA's, as XLA keeps them in
# xla/backends/gpu/target_config/specs/h100_sxm.txtpb.
CARDS = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}


def devices(text: str) -> list[jax.Device]:
    """The devices that CARD:HOSTSxGPUS spells, such as h100:64x8; they compile and cannot run.

    Raises UserError for another spelling or card, or where jax[cuda12] is not installed.
    """
    card, _, topology = text.partition(":")
    sizes = mesh.sizes_in(topology, 2)
    if card not in CARDS or not sizes:
        raise UserError(
            f"--target={text}: expected CARD:HOSTSxGPUS with a card of {', '.join(CARDS)}, such as h100:64x8, and "
            f"at most {mesh.MOST_DEVICES} GPUs"
        )
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=card,
            topology=f"1x{sizes[0]}x{sizes[1]}",
            target_config=CARDS[card],
        )
    except Exception as error:
        count = math.prod(sizes)
        simulate = f", or compile for the CPU with --cpu_devices={count}"
        raise UserError(
            f"--target={text}: there is no compiler for it ({' '.join(str(error).split())[:150]}): install "
            f"requirements.txt{simulate if count <= MOST_CPU_DEVICES else ''}"
        ) from None
    return list(description.devices)
