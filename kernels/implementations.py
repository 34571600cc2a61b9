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


def platform() -> str:
    """The platform that a function is traced for: "cpu", "gpu" or "tpu".

    That of the mesh of `jax.set_mesh` or `jax.shard_map`, which may be of devices that are not here, else the one that
    JAX computes on by default. Who places an array by hand on another platform's device names the implementation.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def run_implementation(
    implementation: str | None,
    table: Mapping[str, Callable[..., Any]],
    preferred: Mapping[str, Sequence[str]],
    *arguments: Any,
) -> Any:
    """Call the named implementation, or with None the platform's best that accepts the arguments.

    The platform is that of the mesh that the caller traces under, see `platform`.

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
    refusals, here = [], platform()
    for name in preferred.get(here, preferred[OTHER]):
        try:
            return table[name](*arguments)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"no implementation for {here} accepts these arguments. {'; '.join(refusals)}")
