"""What each device of a mesh axis sends to each other: all that the exchange needs besides the rows.

Letters: N devices of the axis.
"""

from typing import NamedTuple

from jaxtyping import Array, Int


class Slices(NamedTuple):
    """One device's view; entry i is about device i of the axis. Rows that are sent twice, or over others, are the
    caller's mistake."""

    send_from: Int[Array, " N"]
    """First of this device's rows that go to i."""
    send: Int[Array, " N"]
    """How many go to i."""
    write_to: Int[Array, " N"]
    """First row on i that they become."""
    receive: Int[Array, " N"]
    """How many come from i."""
