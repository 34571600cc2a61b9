"""How `dynamoe train` names the upcycling techniques: `--upcycle granular-split --upcycle.shards 4`.

A technique is a type, and its fields become options; which type has to be known before the options are parsed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...moe import Copy, CopyWithNoise, GranularSplit, MoEfication, Upcycling

Name = Literal["copy", "copy-with-noise", "granular-split", "moefication"]
TECHNIQUES: dict[str, type[Upcycling]] = {
    "copy": Copy,
    "copy-with-noise": CopyWithNoise,
    "granular-split": GranularSplit,
    "moefication": MoEfication,
}
OPTION = "--upcycle"


@dataclass(frozen=True, kw_only=True)
class NoTechnique:
    """Nothing is upcycled: there are no options."""


def chosen_technique(arguments: Sequence[str]) -> Upcycling | NoTechnique:
    """The technique that the arguments name, with its default values; a wrong name is left to the parser."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        if name == OPTION and (value or following) in TECHNIQUES:
            return TECHNIQUES[value or following]()
    return NoTechnique()


def technique_of(name: str | None, technique: object) -> Upcycling | None:
    """The parsed technique. Raises ValueError where it is not the one named: the option stood there more than once."""
    if name is None and isinstance(technique, NoTechnique):
        return None
    if name is None or not isinstance(technique, TECHNIQUES[name]):
        raise ValueError(f"upcycle is {name} and {technique}; the option may stand there once")
    return technique
