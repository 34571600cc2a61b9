"""The estimate of a step's time, against an example computed by hand."""

import pytest

from dynamoe.experiments.planning.roofline import assumptions, estimate, exchanges_of
from dynamoe.kernels.chips import CHIPS
from dynamoe.kernels.collectives import Collective


def test_three_times_and_their_bounds(on):
    placed = on("v5e", "2x2", fsdp=4)
    gather = Collective("all-gather", 400_000_000, ("fsdp",), 2)
    unknown = Collective("all-reduce", 100_000_000, None, None)
    exchanges = exchanges_of([unknown, gather], placed)
    # Two lines of two: 100 GB/s into each device. 2 x 300 MB, and 150 MB once.
    assert [one.kind for one in exchanges] == ["all-gather", "all-reduce"]
    assert [one.wire_bytes for one in exchanges] == [600e6, 150e6]
    assert [one.seconds for one in exchanges] == pytest.approx([6e-3, 1.5e-3])
    peak = 4 * 197e9  # in a millisecond
    time = estimate(
        placed,
        model_flops=peak,
        needed_flops=1.5 * peak,
        executed_flops=2 * peak,
        hbm_bytes=819e6,
        exchanges=exchanges,
    )
    assert time[:4] == pytest.approx((1.5e-3, 2e-3, 1e-3, 7.5e-3))
    assert (time.overlapped, time.serial) == pytest.approx((7.5e-3, 10.5e-3))
    assert time.utilization(10e-3) == pytest.approx(0.1)
    assert time.executed_utilization(10e-3) == pytest.approx(0.2)


@pytest.mark.parametrize("chip", CHIPS)
def test_an_estimate_says_what_it_assumes(chip):
    text = " ".join(assumptions(chip))
    assert f"{CHIPS[chip].flops / 1e12:g} TFLOP/s" in text and "no latency" in text and "lower bound" in text
