"""Models: attention, blocks, the decoder language model, sharding rules, generation."""

from .attention import Attention
from .cache import Cache, LayerCache
from .decoder import Decoder, DecoderLM, Hidden, Output, with_layers
from .ffn import AtLayers, Dense, EveryNth, FirstLayers
from .likelihood import negative_log_likelihood
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
    "Hidden",
    "LayerCache",
    "Layout",
    "MeshRules",
    "MeshShape",
    "Output",
    "negative_log_likelihood",
    "with_layers",
]
