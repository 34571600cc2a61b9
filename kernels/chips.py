"""The chips that programs are compiled for ahead of time: what one device has, and how its compiler calls it."""

from typing import NamedTuple

MEBI = 2**20


class Chip(NamedTuple):
    """What one device of a kind has; a tpu7x chip is two devices, a v5p chip one of two cores."""

    topology: str
    """The smallest, or of a GPU one box: partitions x hosts x devices."""
    larger: str
    """An example of another one."""
    hbm_bytes: int
    vmem_bytes: int | None
    """Of one core of a TPU."""
    gpu: str | None = None
    """Of a GPU, its description for XLA, as a text proto."""


# TPUs: `jax.experimental.pallas.tpu.get_tpu_info` of JAX 0.10.2; a test holds the table to it.
# GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM (memory and its bandwidth) and its Hopper tuning guide (the rest),
# https://docs.nvidia.com/cuda/hopper-tuning-guide.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  device_memory_size: {memory}  memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
_H100 = _HOPPER.format(memory=80_000_000_000, bandwidth=3_350_000_000_000, name="NVIDIA H100 80GB HBM3")
_H200 = _HOPPER.format(memory=141_000_000_000, bandwidth=4_800_000_000_000, name="NVIDIA H200")
CHIPS = {
    "v5e": Chip("2x2", "4x4", 17_200_000_000, 128 * MEBI),
    "v5p": Chip("2x2x1", "4x4x4", 103_000_000_000, 64 * MEBI),
    "v6e": Chip("2x2", "4x4", 34_400_000_000, 128 * MEBI),
    "tpu7x": Chip("2x2x1", "4x4x4", 103_000_000_000, 64 * MEBI),
    "h100": Chip("1x1x8", "1x4x8", 80_000_000_000, None, _H100),
    "h200": Chip("1x1x8", "1x4x8", 141_000_000_000, None, _H200),
}
