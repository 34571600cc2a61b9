"""Qwen3-MoE: Yang et al. 2025, https://arxiv.org/abs/2505.09388. The k weights renormalised, heads normalised."""

import dataclasses
from collections.abc import Iterator

from ...moe import BalanceLoss, MoE, SwiGLU, TopK
from ..decoder import Decoder
from ..ffn import AtLayers, Dense
from .family import Family, attention_tensors, balance_coefficient, frame, gated_tensors, layer_norms
from .fields import Fields
from .llama import decoder_of, dense_layer, llama_attention
from .mapping import FileTensor
from .olmoe import mixture_layer


class Qwen3MoE(Family):
    """See above. Layers may be dense: those of `mlp_only_layers`, or between every `decoder_sparse_step`-th."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"

    def decoder(self, config: Fields) -> Decoder:
        config.must_be("hidden_act", "silu")
        window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
        attention = llama_attention(config, default_kv_heads=4)
        attention = dataclasses.replace(attention, qk_norm=True, window=window)
        layers, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step", 1)
        named = config.integers("mlp_only_layers", ())
        dense = tuple(layer for layer in range(layers) if layer in named or (layer + 1) % step)
        k = config.integer("num_experts_per_tok", 8)
        ffn = MoE(
            experts=config.integer("num_experts", config.integer("num_local_experts", 128)),
            router=TopK(k=k, renormalize=config.flag("norm_topk_prob", False)),
            expert=SwiGLU(hidden=config.integer("moe_intermediate_size", 768)),
            losses=(BalanceLoss(coefficient=balance_coefficient(config, k, layers - len(dense))),),
        )
        if dense:
            hidden = config.integer("intermediate_size", 6144)
            ffn = AtLayers(ffn=Dense(hidden=hidden), layers=dense, otherwise=ffn)
        return decoder_of(config, attention, ffn=ffn)

    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        yield from frame(decoder)
        for layer in range(decoder.layers):
            if isinstance(decoder.ffn.at(layer), MoE):
                yield from mixture_layer(decoder, layer)
                continue
            attention, ffn = dense_layer(decoder, layer)
            yield from layer_norms(layer, decoder.width)
            yield from attention_tensors(layer, attention, decoder.width)
            yield from gated_tensors(f"model.layers.{layer}.mlp", f"layers.{layer}.ffn", decoder.width, ffn.hidden)
