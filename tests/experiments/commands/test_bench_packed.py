"""`dynamoe bench packed_decoding` times right results alone."""

from io import StringIO

import pytest
from rich.console import Console

from dynamoe.compress import RoundToNearest
from dynamoe.experiments.commands import bench_packed
from dynamoe.models import Attention, Decoder
from dynamoe.moe import MoE, SwiGLU, TopK

CONFIG = Decoder(
    vocab=16,
    width=128,
    layers=1,
    attention=Attention(heads=2),
    ffn=MoE(experts=2, router=TopK(k=2), expert=SwiGLU(hidden=128, implementation="reference")),
)


def bench() -> tuple[int, str]:
    written = StringIO()
    console = Console(file=written, width=200)
    return bench_packed.bench_packed(1, console, CONFIG, [RoundToNearest(group_size=64)]), written.getvalue()


def test_the_table_has_bytes_and_error_of_what_was_packed_and_times_over_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_packed, "BATCHES", (1,))
    status, text = bench()
    assert status == 0 and "1 rows: a token of float32 takes" in text
    (row,) = [line.split("│") for line in text.splitlines() if "int4, groups of 64 " in line]
    elements = 3 * 2 * 128 * 128
    assert [cell.strip() for cell in row[2:5]] == ["4.500", f"{elements // 2 + elements // 64 * 4:,}", "0.281"]
    assert 0.05 < float(row[5]) < 0.2


def test_wrong_logits_are_told_and_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_packed, "LOGITS_ERROR", 0.0)
    status, text = bench()
    assert status == 1 and "allowed is 0e+00: nothing is timed" in text and "takes" not in text
