"""Granite 3.0 MoE: IBM 2024, "Granite 3.0 Language Models". Mixtral's routing, multipliers on embeddings, scores,
residuals and logits, experts stored together."""

import dataclasses
from collections.abc import Iterator

from ...moe import BalanceLoss, MoE, SwiGLU, TopK
from ..attention import Attention
from ..decoder import Decoder
from .family import Family, attention_tensors, balance_coefficient, frame, layer_norms, router_tensor
from .fields import Fields
from .llama import decoder_of, llama_attention
from .mapping import FileTensor, Piece, View


class GraniteMoE(Family):
    """See above."""

    model_type = "granitemoe"
    architecture = "GraniteMoeForCausalLM"

    def decoder(self, config: Fields) -> Decoder:
        config.must_be("hidden_act", "silu")
        attention = dataclasses.replace(llama_attention(config), scale=config.number("attention_multiplier", 1.0))
        k, layers = config.integer("num_experts_per_tok", 2), config.integer("num_hidden_layers")
        ffn = MoE(
            experts=config.integer("num_local_experts", 8),
            router=TopK(k=k),
            expert=SwiGLU(hidden=config.integer("intermediate_size")),
            losses=(BalanceLoss(coefficient=balance_coefficient(config, k, layers)),),
        )
        divisor = config.number("logits_scaling", 1.0)
        if divisor <= 0:
            raise ValueError(f"{config.name}: logits_scaling is {divisor}; it must be above 0")
        return dataclasses.replace(
            decoder_of(config, attention, ffn=ffn),
            embedding_scale=config.number("embedding_multiplier", 1.0),
            residual_scale=config.number("residual_multiplier", 1.0),
            logit_scale=1 / divisor,
        )

    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        yield from frame(decoder)
        for layer in range(decoder.layers):
            attention, ffn = decoder.attention.at(layer), decoder.ffn.at(layer)
            assert isinstance(attention, Attention) and isinstance(ffn, MoE) and isinstance(ffn.expert, SwiGLU)
            prefix, path = f"model.layers.{layer}.block_sparse_moe", f"layers.{layer}.ffn.experts"
            width, hidden, experts = decoder.width, ffn.expert.hidden, ffn.experts
            yield from layer_norms(layer, width)
            yield from attention_tensors(layer, attention, width)
            yield router_tensor(f"{prefix}.router.layer.weight", layer, width, experts)
            both = (experts, 2 * hidden, width)
            halves = (
                Piece(f"{path}.{name}", View(both, (0, 2, 1), (1, first, first + hidden, 1)))
                for name, first in (("gate", 0), ("up", hidden))
            )
            yield FileTensor(f"{prefix}.input_linear.weight", both, tuple(halves))
            out = (experts, width, hidden)
            yield FileTensor(f"{prefix}.output_linear.weight", out, (Piece(f"{path}.down", View(out, (0, 2, 1))),))
