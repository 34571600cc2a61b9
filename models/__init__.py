"""Models: attention, blocks, the decoder, classifiers of images and texts, sharding rules, generation."""

from .attention import Attention
from .cache import Cache, LayerCache
from .classifier import Classifier, ClassifierModel, ClassifierOutput
from .decoder import Decoder, DecoderLM, NewTokens, Output
from .ffn import AtLayers, Dense, EveryNth, FirstLayers
from .latent_attention import LatentAttention
from .layer_stack import Hidden, with_layers
from .likelihood import exit_divergence, negative_log_likelihood
from .pooling import ClassToken, MeanPool, Pooling
from .rotary import DynamicNTK, LinearScaling, Llama3Scaling, Yarn
from .self_attention import AttentionAtLayers, AttentionPattern, SelfAttention
from .sharding import Layout, MeshRules, MeshShape
from .text_classifier import TextClassifier
from .vision_transformer import VisionTransformer

__all__ = [
    "AtLayers",
    "Attention",
    "AttentionAtLayers",
    "AttentionPattern",
    "Cache",
    "ClassToken",
    "Classifier",
    "ClassifierModel",
    "ClassifierOutput",
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
    "MeanPool",
    "MeshRules",
    "MeshShape",
    "NewTokens",
    "Output",
    "Pooling",
    "SelfAttention",
    "TextClassifier",
    "VisionTransformer",
    "Yarn",
    "exit_divergence",
    "negative_log_likelihood",
    "with_layers",
]
