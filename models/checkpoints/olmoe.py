"""OLMoE: Muennighoff et al. 2024, https://arxiv.org/abs/2409.02060. Every layer a mixture; softmax, then the top k, as
they are; queries and keys normalised over all heads."""

import dataclasses
from collections.abc import Iterator

from ...moe import BalanceLoss, MoE, SwiGLU, TopK
from ..attention import Attention
from ..decoder import Decoder
from .family import Family, attention_tensors, balance_coefficient, frame, layer_norms, mixture_tensors
from .fields import Fields
from .llama import decoder_of, llama_attention
from .mapping import FileTensor


class Olmoe(Family):
    """See above."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"

    def decoder(self, config: Fields) -> Decoder:
        config.must_be("hidden_act", "silu")
        attention = dataclasses.replace(
            llama_attention(config), projection_norm=True, clip=config.number("clip_qkv", None)
        )
        k, layers = config.integer("num_experts_per_tok", 8), config.integer("num_hidden_layers")
        ffn = MoE(
            experts=config.integer("num_experts", 64),
            router=TopK(k=k, renormalize=config.flag("norm_topk_prob", False)),
            expert=SwiGLU(hidden=config.integer("intermediate_size")),
            losses=(BalanceLoss(coefficient=balance_coefficient(config, k, layers, 0.01)),),
        )
        return decoder_of(config, attention, ffn=ffn, epsilon=1e-5)

    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        yield from frame(decoder)
        for layer in range(decoder.layers):
            yield from mixture_layer(decoder, layer)


def mixture_layer(decoder: Decoder, layer: int) -> Iterator[FileTensor]:
    """A layer of grouped-query attention and a mixture of gated experts."""
    attention, ffn = decoder.attention.at(layer), decoder.ffn.at(layer)
    assert isinstance(attention, Attention) and isinstance(ffn, MoE) and isinstance(ffn.expert, SwiGLU)
    yield from layer_norms(layer, decoder.width)
    yield from attention_tensors(layer, attention, decoder.width)
    yield from mixture_tensors(f"model.layers.{layer}.mlp", layer, decoder.width, ffn.expert.hidden, ffn.experts)
