"""How an op chooses among its implementations; the same rule for every op.

An op's `api.py` holds a table from name to function, all with the same arguments and the same meaning, and for each
platform the names that may run unasked, best first.

- `implementation=None` runs the first of the platform's names that accepts the arguments.
- A name runs exactly that one or raises: nothing falls back silently when a name was given.
- `ValueError` is the caller's mistake. `NotImplementedError` is an implementation's limit; it says what came and what
  is allowed, and is raised while tracing, so that a refusal costs no compute.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

OTHER = "other"
"""Stands in `preferred` for the platforms that it does not name."""


def run_implementation(
    implementation: str | None,
    table: Mapping[str, Callable[..., Any]],
    preferred: Mapping[str, Sequence[str]],
    *arguments: Any,
) -> Any:
    """Call the named implementation, or with None the platform's best that accepts the arguments.

    The platform is the one that JAX computes on by default. Who compiles for another one, ahead of time or by a device
    placed by hand, names the implementation: what a platform prefers may not even trace on this one.

    Args:
        implementation: a key of `table`, or None.
        table: the op's implementations by name.
        preferred: names for each platform ("cpu", "gpu", "tpu" or OTHER), best first.
        *arguments: what the implementation is called with.

    Raises:
        ValueError: no implementation has that name.
        NotImplementedError: the named one, or each of the platform's, refuses the arguments.
    """
    if implementation is not None:
        if implementation not in table:
            raise ValueError(f"implementation is {implementation!r}; allowed are None, {', '.join(map(repr, table))}")
        return table[implementation](*arguments)
    platform = jax.default_backend()
    refusals = []
    for name in preferred.get(platform, preferred[OTHER]):
        try:
            return table[name](*arguments)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"no implementation for {platform} accepts these arguments. {'; '.join(refusals)}")
