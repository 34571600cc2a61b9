"""Tables for the report and for a terminal."""

from rich.table import Table
from rich.text import Text

from ..models.accounting import count_parts
from . import page
from .experiment import Experiment


def parts_table(experiment: Experiment) -> page.Table:
    """Parameters, active parameters and FLOPs per token of an experiment's model, by part."""
    parts = count_parts(experiment.model, experiment.sequence_length)
    total = parts[-1].flops
    rows = [
        (
            part.name,
            part.parameters,
            f"{part.active_parameters:,.0f}",
            f"{part.flops:,.0f}",
            f"{part.flops / total:.1%}",
        )
        for part in parts
    ]
    caption = (
        f"Per token, forward, in windows of {experiment.sequence_length} tokens. FLOPs are those of matrix products, "
        "a multiplication and an addition counted as two."
    )
    return page.Table(("part", "parameters", "active", "FLOPs per token", "of all"), rows, caption, total=True)


def for_terminal(table: page.Table) -> Table:
    """A table of a report, as a terminal shows it."""
    shown = Table(caption=Text(table.caption), caption_justify="left", caption_style="dim")
    for place, (name, numeric) in enumerate(zip(table.columns, table.numeric, strict=True)):
        # What a row is about stays whole: it may be what one has to type.
        shown.add_column(name, justify="right" if numeric else "left", no_wrap=place == 0)
    for cells in table.cells:
        shown.add_row(*cells)
    return shown
