"""Tables for a terminal."""

from rich.table import Table
from rich.text import Text

from ..models import Decoder
from ..models.accounting import count_parts
from . import page


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


def for_terminal(table: page.Table) -> Table:
    """A table of a report, as a terminal shows it."""
    shown = Table(caption=Text(table.caption), caption_justify="left", caption_style="dim")
    for name, numeric in zip(table.columns, table.numeric, strict=True):
        shown.add_column(name, justify="right" if numeric else "left")
    for cells in table.cells:
        shown.add_row(*cells)
    return shown
