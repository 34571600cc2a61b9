"""How long a collective takes at least, by the links that its devices share.

Letters: n devices, B bytes of the collective's result on one device, w bytes per second of one link, one way.

On a torus, a side of k devices that is closed to a ring moves 2 w into each device, a line w, for its last device has
one link; a collective over several sides uses all of them at once. An all-to-all is bound by what has to pass the
middle of a side: k B / 8 w of a ring, k B / 4 w of a line, the longest of them (half of each device's bytes cross the
middle, over two links of each ring and one of each line). Among boxes a device takes in what comes from its own box
through the switch and the rest through its network adapter, at the same time.

Latency is not counted, nor that links may be busy with another collective.
"""

from .placement import Span


def wire_bytes(kind: str, size: int | float, devices: int) -> float:
    """Bytes that one device has to take in.

    Args:
        kind: of `kernels.collectives.KINDS`.
        size: B, of the result.
        devices: n that take part.
    """
    if devices < 2:
        return 0.0
    others = (devices - 1) / devices
    if kind == "all-reduce":
        return 2 * others * size
    if kind == "reduce-scatter":
        return float((devices - 1) * size)
    if kind in ("collective-permute", "collective-broadcast"):
        return float(size)
    return others * size  # all-gather, all-to-all; of a ragged one the result's buffer, which bounds what comes


def seconds(kind: str, size: int | float, span: Span) -> float:
    """The least time of one collective.

    Args:
        kind: of `kernels.collectives.KINDS`.
        size: B, bytes of its result on one device.
        span: what its devices span.
    """
    moved = wire_bytes(kind, size, span.devices)
    if moved == 0:
        return 0.0
    if span.boxes is not None:
        return _among_boxes(kind, moved, span)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return max(side.devices * size / ((8 if side.closed else 4) * side.link) for side in span.sides)
    if kind in ("collective-permute", "collective-broadcast"):
        return moved / min(side.link for side in span.sides)
    return moved / sum(side.link * (2 if side.closed else 1) for side in span.sides)


def _among_boxes(kind: str, moved: float, span: Span) -> float:
    assert span.boxes is not None
    inside = span.devices // span.hosts
    if span.hosts == 1:
        return moved / span.boxes.switch
    if kind in ("all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast"):
        outside = moved * (span.devices - inside) / (span.devices - 1)  # each device's own
    else:
        outside = moved * (span.hosts - 1) / span.hosts / inside * span.devices / (span.devices - 1)  # a box's, shared
    return max(outside / span.boxes.network, moved / span.boxes.switch)
