"""The chips that programs are compiled for ahead of time: what one device has, and how its compiler calls it.

Bandwidths are bytes per second one way; makers often add up both ways. All are peaks, which no program reaches.
"""

from typing import NamedTuple

MEBI = 2**20


class Torus(NamedTuple):
    """Chips in a grid of two or three dimensions, each linked to its neighbours in both directions of each."""

    link: float
    """Of one link, for one device: devices of one chip share its links."""
    ring: int
    """A side of this many chips, or a multiple, is closed to a ring; shorter ones are lines."""
    cubes: bool
    """Whether a side is closed only where all sides are."""
    die: float | None = None
    """Between the two devices of one chip."""

    def __str__(self) -> str:
        side = f"{self.ring} chips or a multiple" + " in every direction" * self.cubes
        die = f", {self.die / 1e9:g} between the two devices of a chip" if self.die is not None else ""
        return f"{self.link / 1e9:g} GB/s one way{die}, rings along sides of {side}"

    def closed(self, sides: tuple[int, ...]) -> tuple[bool, ...]:
        """Which sides of a slice are rings."""
        rings = tuple(side % self.ring == 0 for side in sides)
        return (all(rings),) * len(sides) if self.cubes else rings


class Boxes(NamedTuple):
    """Boxes in which every device reaches every other through a switch, and a network between the boxes."""

    switch: float
    """Of one device into its box."""
    network: float
    """Of one device out of its box."""
    devices: int
    """In one box."""

    def __str__(self) -> str:
        return f"{self.switch / 1e9:g} GB/s one way in a box of {self.devices}, {self.network / 1e9:g} out of it"


class Chip(NamedTuple):
    """What one device of a kind has; a tpu7x chip is two devices, a v5p chip one of two cores."""

    topology: str
    """The smallest, or of a GPU one box: partitions x hosts x devices."""
    larger: str
    """An example of another one."""
    hbm_bytes: int
    vmem_bytes: int | None
    """Of one core of a TPU."""
    flops: float
    """Operations per second of products of bfloat16 matrices summed in float32, without sparsity."""
    hbm_bandwidth: float
    """Read or written."""
    links: Torus | Boxes
    """To other devices of a slice or a cluster."""
    gpu: str | None = None
    """Of a GPU, its description for XLA, as a text proto."""


# TPUs: memory and VMEM are `jax.experimental.pallas.tpu.get_tpu_info` of JAX 0.10.2; a test holds the table to it.
# Flops and bandwidths are Google's pages: 197 TFLOP/s and 819 GB/s for v5e, 459 and 2765 for v5p (JAX says 2460), 918
# and 1638 for v6e, 2307 and 7380 for a tpu7x chip, which is two devices. "Bidirectional ICI bandwidth per chip" is 400
# GB/s for v5e (4 links), 1200 for v5p (6), 800 for v6e (4) and 1200 for tpu7x (6): divided here by the links and by two
# directions, and for tpu7x by two devices; its two dies are linked by six times a link of the chip (not checked):
# https://docs.cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, .../tpu7x.
# Rings: v5p has them in slices of 4x4x4 and larger (the same page); not checked: tpu7x likewise, and v5e and v6e along
# sides of 16 alone. That v5e's 16x16 has them agrees with its page's 1.6 TB/s through the middle of a pod.
# GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM (memory, its bandwidth, half of the flops that they give with
# sparsity, half of NVLink's 900 GB/s, which are both ways) and its Hopper tuning guide (the rest),
# https://docs.nvidia.com/cuda/hopper-tuning-guide. A box is a DGX or HGX of 8 with one 400 Gb/s adapter for each GPU.
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
_DGX = Boxes(switch=450e9, network=50e9, devices=8)
CHIPS = {
    "v5e": Chip("2x2", "4x4", 17_200_000_000, 128 * MEBI, 197e12, 819e9, Torus(50e9, 16, False)),
    "v5p": Chip("2x2x1", "4x4x4", 103_000_000_000, 64 * MEBI, 459e12, 2.765e12, Torus(100e9, 4, True)),
    "v6e": Chip("2x2", "4x4", 34_400_000_000, 128 * MEBI, 918e12, 1.638e12, Torus(100e9, 16, False)),
    "tpu7x": Chip("2x2x1", "4x4x4", 103_000_000_000, 64 * MEBI, 1153.5e12, 3.69e12, Torus(50e9, 4, True, die=600e9)),
    "h100": Chip("1x1x8", "1x4x8", 80_000_000_000, None, 989.4e12, 3.35e12, _DGX, _H100),
    "h200": Chip("1x1x8", "1x4x8", 141_000_000_000, None, 989.4e12, 4.8e12, _DGX, _H200),
}
