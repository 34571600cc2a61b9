"""The known families, and which of them a configuration is of."""

import difflib

from .deepseek import DeepSeekV2, DeepSeekV3
from .family import Family
from .fields import Fields
from .gpt_oss import GptOss
from .granite_moe import GraniteMoE
from .llama import Llama
from .mixtral import Mixtral
from .olmoe import Olmoe
from .qwen3 import Qwen3
from .qwen3_moe import Qwen3MoE

FAMILIES: tuple[Family, ...] = (
    Llama(),
    Qwen3(),
    Mixtral(),
    Olmoe(),
    Qwen3MoE(),
    GraniteMoE(),
    DeepSeekV2(),
    DeepSeekV3(),
    GptOss(),
)


def family_of(config: Fields) -> Family:
    """The family that config.json names by its `model_type`, or else by its `architectures`.

    Raises:
        ValueError: it is unknown; the nearest known ones are named.
    """
    kind = config.values.get("model_type")
    architectures = config.values.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    for family in FAMILIES:
        if kind == family.model_type or (kind is None and family.architecture in architectures):
            return family
    asked = str(kind if kind is not None else next(iter(architectures), None))[:80]
    known = [name for family in FAMILIES for name in (family.model_type, family.architecture)]
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
    nearest = f"the nearest are {', '.join(near)}; " if near else ""
    all_of_them = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(f"{config.name}: model_type is {asked!r}, which is unknown; {nearest}known are {all_of_them}")
