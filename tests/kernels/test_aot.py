"""What the ahead-of-time compiler refuses, and how its report prints; that it compiles: tests/aot."""

import importlib.metadata
import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from dynamoe.kernels.aot import Kernel, Report, compile_for
from dynamoe.kernels.chips import CHIPS
from dynamoe.kernels.collectives import Collective

REPORT = Report(
    chip="v5p:4x4x4",
    devices=64,
    argument_bytes=3 * 2**30,
    output_bytes=2**30,
    temporary_bytes=2**29,
    alias_bytes=2**30,
    flops=1.5e15,
    kernels=(Kernel("product", (2, 11, 1), 3e9, 5 * 2**20), Kernel("other", None, None, None)),
    collectives=(Collective("all-to-all", 2048, ("expert",), 32), Collective("all-gather", 5, None, None)),
    compile_seconds=12.34,
)


def test_a_chip_that_is_not_known_is_named():
    with pytest.raises(
        ValueError, match="chip is 'v9'; allowed are v5e, v5p, v6e, tpu7x, h100, h200, each also with a topology"
    ):
        compile_for("v9", jnp.sin, jnp.ones(3))


@pytest.mark.parametrize(("chip", "needed"), [("v5e", "libtpu"), ("h100", "JAX' plugin for CUDA")])
def test_without_a_compiler_the_extra_is_named(monkeypatch, chip, needed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"compiling for {chip} needs {needed}: pip install 'dynamoe\[aot\]'"
    ):
        compile_for(chip, jnp.sin, jnp.ones(3))


@pytest.mark.parametrize(
    ("chip", "package", "needed"), [("v5p", "libtpu", r"0\.0\.\d+\.\*"), ("h200", "jax-cuda13-plugin", jax.__version__)]
)
def test_a_compiler_that_jax_does_not_name_is_refused_with_the_one_that_it_does(monkeypatch, chip, package, needed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1.2")
    with pytest.raises(ImportError, match=f"needs {package} {needed}, .* 0.0.1.2 is installed: pip .*=={needed}"):
        compile_for(chip, jnp.sin, jnp.ones(3))


def test_a_report_prints_what_is_known_and_what_is_not():
    assert (
        REPORT.memory_bytes == 3.5 * 2**30 and REPORT.fits and not replace(REPORT, chip="v5e", output_bytes=2**34).fits
    )
    assert REPORT.vmem_bytes == 5 * 2**20
    assert REPORT.table() == [
        ("chip", "v5p:4x4x4, 64 devices"),
        ("arguments", "3.00 GiB"),
        ("outputs", "1.00 GiB"),
        ("temporaries", "512.00 MiB"),
        ("memory", "3.50 GiB of 95.93 GiB per device"),
        ("matrix products", "1.5e+15 FLOP over all devices"),
        ("product", "grid 2 x 11 x 1 = 22 steps, at most 3e+09 FLOP, 5.00 MiB of VMEM of 64.00 MiB"),
        ("other", "grid known at run time, FLOP not known, VMEM not known of 64.00 MiB"),
        ("all-to-all", "2.00 KiB over expert, 32 times"),
        ("all-gather", "5 B axes not known, times not known"),
        ("compiled in", "12.3 s"),
    ]


def test_the_table_of_chips_says_what_jax_says():
    versions = pltpu.ChipVersion.TPU_V5E, pltpu.ChipVersion.TPU_V5P, pltpu.ChipVersion.TPU_V6E, pltpu.ChipVersion.TPU_7X
    tpus = [chip for chip in CHIPS.values() if chip.gpu is None]
    for chip, version in zip(tpus, versions, strict=True):
        cores = 2 if version == pltpu.ChipVersion.TPU_V5P else 1
        info = pltpu.get_tpu_info_for_chip(version, cores)
        assert (chip.vmem_bytes, chip.hbm_bytes) == (info.vmem_capacity_bytes, cores * info.hbm_capacity_bytes)
        assert chip.flops == pytest.approx(cores * info.bf16_ops_per_second, rel=0.01)
        assert chip.hbm_bandwidth == pytest.approx(cores * info.mem_bw_bytes_per_second, rel=0.13)  # v5p's differs


@pytest.mark.parametrize(
    ("chip", "sides", "closed"),
    [
        ("v5e", (8, 16), (False, True)),
        ("v5p", (4, 4, 8), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),
    ],
)
def test_long_sides_of_a_slice_are_rings(chip, sides, closed):
    assert CHIPS[chip].links.closed(sides) == closed
