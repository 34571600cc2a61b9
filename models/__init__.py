"""Models: attention, blocks, the decoder language model, sharding rules, generation."""

from .attention import Attention
from .cache import Cache, LayerCache
from .decoder import Decoder, DecoderLM, Hidden, NewTokens, Output, with_layers
from .ffn import AtLayers, Dense, EveryNth, FirstLayers
from .latent_attention import LatentAttention
from .likelihood import exit_divergence, negative_log_likelihood
from .rotary import DynamicNTK, LinearScaling, Llama3Scaling, Yarn
from .self_attention import AttentionAtLayers, AttentionPattern, SelfAttention
from .sharding import Layout, MeshRules, MeshShape

__all__ = [
    "AtLayers",
    "Attention",
    "AttentionAtLayers",
    "AttentionPattern",
    "Cache",
    "Decoder",
    "DecoderLM",
    "Dense",
    "DynamicNTK",
    "EveryNth",
    "FirstLayers",
    "Hidden",
    "LatentAttention",
    "LayerCache",
    "Layout",
    "LinearScaling",
    "Llama3Scaling",
    "MeshRules",
    "MeshShape",
    "NewTokens",
    "Output",
    "SelfAttention",
    "Yarn",
    "exit_divergence",
    "negative_log_likelihood",
    "with_layers",
]
