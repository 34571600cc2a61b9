"""Models: attention, blocks, the decoder language model, sharding rules, generation."""

from .attention import Attention
from .cache import Cache, LayerCache
from .decoder import Decoder, DecoderLM, Output, with_layers
from .ffn import AtLayers, Dense, EveryNth, FirstLayers
from .sharding import Layout, MeshRules, MeshShape

__all__ = [
    "AtLayers",
    "Attention",
    "Cache",
    "Decoder",
    "DecoderLM",
    "Dense",
    "EveryNth",
    "FirstLayers",
    "LayerCache",
    "Layout",
    "MeshRules",
    "MeshShape",
    "Output",
    "with_layers",
]
