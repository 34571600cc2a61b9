"""Tables for a terminal."""

from rich.table import Table

from ..models import Decoder
from ..models.accounting import count_parts


def cost_table(model: Decoder, sequence_length: int) -> Table:
    """Parameters, active parameters and FLOPs per token of a model, by part."""
    table = Table(
        title=f"per token, forward, windows of {sequence_length} tokens", title_style="", title_justify="left"
    )
    table.add_column("part")
    for name in ("parameters", "active parameters", "active FLOPs"):
        table.add_column(name, justify="right")
    for part in count_parts(model, sequence_length):
        numbers = (part.parameters, part.active_parameters, part.flops)
        table.add_row(
            part.name, *(f"{number:,.0f}" for number in numbers), style="bold" if part.name == "total" else ""
        )
    return table
