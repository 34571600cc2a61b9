"""Fine-grained experts: the same cost in more and smaller experts."""

import dataclasses
from typing import Any

from .layer import MoE


def fine_grained(moe: MoE, factor: int) -> MoE:
    """Cut each expert into `factor` smaller ones, of which a token gets `factor` times as many.

    Dai et al. 2024 (DeepSeekMoE), https://arxiv.org/abs/2401.06066, eq. 6-8: E * m experts of hidden width F / m, K * m
    of them per token. Parameters and active FLOPs of the experts stay the same; the router's product and its weights
    grow by the factor, and so do the rows that a dispatcher carries. Shared experts stay as they are.

    Args:
        moe: a mixture whose router sends each token to its `k` experts, as `TopK`, and whose expert has a field
            `hidden`, as `SwiGLU`.
        factor: m.

    Raises:
        ValueError: the factor is below 1 or does not divide the hidden width, or the router or the expert has no such
            field.
    """
    if factor < 1:
        raise ValueError(f"factor is {factor}; it must be at least 1")
    k, hidden = _field(moe.router, "router", "k"), _field(moe.expert, "expert", "hidden")
    if others := [name for name in ("most", "null_experts") if hasattr(moe.router, name)]:
        raise ValueError(f"moe.router is {moe.router}, whose {others[0]} does not follow k; allowed are others")
    if hidden % factor:
        raise ValueError(f"factor is {factor}; it must divide moe.expert.hidden, which is {hidden}")
    router: Any = moe.router
    expert: Any = moe.expert
    return dataclasses.replace(
        moe,
        experts=moe.experts * factor,
        router=dataclasses.replace(router, k=k * factor),
        expert=dataclasses.replace(expert, hidden=hidden // factor),
    )


def _field(config: Any, name: str, field: str) -> int:
    fields = [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if field not in fields:
        raise ValueError(f"moe.{name} is {config}; it must be a dataclass with a field {field!r}, which is scaled")
    return getattr(config, field)
