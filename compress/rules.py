"""Which array gets which technique, and the one function that carries it out.

    rules = [Rule(pattern="*.experts.*", technique=RoundToNearest(format=INT4, group_size=64))]
    smaller, report = compress(arrays, rules, leave=("*.shared.*",))

Nothing that was asked for is left out in silence: all that cannot be done is told in one error, before any compute.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .coverage import Coverage, CoverageReport, bytes_of
from .technique import Technique


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A technique for all paths of a pattern."""

    pattern: str
    """As of file names: `*` stands for any characters, dots among them, `?` for one, `[ab]` for one of these."""
    technique: Technique
    """What is done to them."""


def compress(
    arrays: Mapping[str, Array],
    rules: Sequence[Rule],
    *,
    leave: Sequence[str] = (),
    unfit: Mapping[str, str] | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], CoverageReport]:
    """Compress arrays by rules.

    Args:
        arrays: matrices [*lead, D, F] by path, where D is the axis that products sum over; others may be among them.
        rules: the first whose pattern fits a path decides; a path that none fits stays as it is.
        leave: patterns of paths that stay as they are, whatever the rules say.
        unfit: paths whose owner cannot use them compressed, and why not. A rule that asks for one is refused.
        statistics: of each path, for techniques that need them.

    Returns:
        Every array or what its technique made of it, by path; and a report of all of them, in the same order.

    Raises:
        ValueError: a pattern decides for no path, or an array that a rule asks for cannot be compressed. All are
            listed, and nothing was computed.
    """
    chosen = choose_techniques(arrays, rules, leave=leave, unfit=unfit, statistics=statistics)
    smaller, entries = {}, []
    for path, array in arrays.items():
        smaller[path], entry = compress_one(path, array, chosen[path], (statistics or {}).get(path))
        entries.append(entry)
    return smaller, CoverageReport(entries=tuple(entries))


def choose_techniques(
    arrays: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    leave: Sequence[str] = (),
    unfit: Mapping[str, str] | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> dict[str, Technique | None]:
    """What `compress` does to every path, from shapes alone. Arguments and errors as there."""
    chosen, problems = _assign(arrays, rules, leave)
    for path, technique in chosen.items():
        if technique is not None:
            problem = (unfit or {}).get(path) or _refusal(technique, arrays[path], (statistics or {}).get(path))
            problems += [f"{path} {list(arrays[path].shape)}: {problem}"] if problem else []
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems)
        raise ValueError(f"rules cannot be carried out; change a pattern, or name what is to stay in `leave`:{listed}")
    return chosen


def compress_one(path: str, array: Array, technique: Technique | None, statistics: Any = None) -> tuple[Any, Coverage]:
    """What a technique makes of one array, with its line of the report; None leaves it as it is."""
    made, error = (array, 0.0) if technique is None else _compressed(technique, array, statistics)
    entry = Coverage(
        path=path,
        technique=None if technique is None else technique.name,
        shape=tuple(array.shape),
        bytes_before=bytes_of(array),
        bytes_after=bytes_of(made),
        error=float(error),
    )
    return made, entry


def _assign(
    paths: Mapping[str, Any], rules: Sequence[Rule], leave: Sequence[str]
) -> tuple[dict[str, Technique | None], list[str]]:
    """The technique of every path, and what is wrong with the patterns."""
    chosen: dict[str, Technique | None] = {}
    left, decided = set(), set()
    for path in paths:
        fitting = {pattern for pattern in leave if fnmatchcase(path, pattern)}
        left |= fitting
        rule = None if fitting else next((at for at, r in enumerate(rules) if fnmatchcase(path, r.pattern)), None)
        decided.add(rule)
        chosen[path] = None if rule is None else rules[rule].technique
    problems = [f"leave names the pattern {pattern!r}, which no path fits" for pattern in leave if pattern not in left]
    for at, rule in enumerate(rules):
        if at not in decided:
            fits = any(fnmatchcase(path, rule.pattern) for path in paths)
            why = "all paths that it fits are decided by `leave` or an earlier rule" if fits else "no path fits it"
            problems.append(f"rule {at} has the pattern {rule.pattern!r}: {why}")
    if not rules:
        problems.append("there is no rule")
    if problems:
        problems.append(f"paths are {', '.join(paths)}")
    return chosen, problems


def _refusal(technique: Technique, array: Array | jax.ShapeDtypeStruct, statistics: Any) -> str | None:
    """Why the technique cannot do it, asked of the array's shape alone."""
    if array.ndim < 2:
        return f"it is {'a vector' if array.ndim else 'a number'}, not a matrix"
    if technique.needs_statistics and statistics is None:
        return f"{technique.name} needs statistics, and there are none of this path"
    try:
        jax.eval_shape(technique.compress, jax.ShapeDtypeStruct(array.shape, array.dtype), statistics)
    except ValueError as error:
        return str(error)
    return None


@functools.partial(jax.jit, static_argnums=0)
def _compressed(technique: Technique, array: Array, statistics: Any) -> tuple[Any, Float[Array, ""]]:
    """What the technique makes of an array, and its relative error, ||W - W'|| / ||W||; of zeros, 0."""
    made = technique.compress(array, statistics)
    wide = array.astype(jnp.float32)
    difference = jnp.linalg.norm((technique.expand(made).astype(jnp.float32) - wide).reshape(-1))
    norm = jnp.linalg.norm(wide.reshape(-1))
    return made, jnp.where(difference == 0, 0.0, difference / norm)
