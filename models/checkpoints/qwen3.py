"""Qwen3, dense: Yang et al. 2025, https://arxiv.org/abs/2505.09388. Queries and keys normalised per head."""

import dataclasses
from collections.abc import Iterator

from ..decoder import Decoder
from ..ffn import Dense
from ..self_attention import AttentionAtLayers
from .family import Family, attention_tensors, frame, gated_tensors, layer_norms
from .fields import Fields
from .llama import decoder_of, dense_layer, llama_attention
from .mapping import FileTensor

KINDS = ("full_attention", "sliding_attention")


class Qwen3(Family):
    """See above."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"

    def decoder(self, config: Fields) -> Decoder:
        config.must_be("hidden_act", "silu")
        full = llama_attention(config, default_head_width=128, default_kv_heads=32)
        full = dataclasses.replace(full, qk_norm=True)
        attention = full
        if near := sliding_layers(config):
            windowed = dataclasses.replace(full, window=config.integer("sliding_window", 4096))
            attention = AttentionAtLayers(attention=windowed, layers=near, otherwise=full)
        return decoder_of(config, attention, ffn=Dense(hidden=config.integer("intermediate_size")))

    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        yield from frame(decoder)
        for layer in range(decoder.layers):
            attention, ffn = dense_layer(decoder, layer)
            yield from layer_norms(layer, decoder.width)
            yield from attention_tensors(layer, attention, decoder.width)
            yield from gated_tensors(f"model.layers.{layer}.mlp", f"layers.{layer}.ffn", decoder.width, ffn.hidden)


def sliding_layers(config: Fields) -> tuple[int, ...]:
    """The layers whose attention has a window: those of `layer_types`, or from `max_window_layers` on."""
    layers, first = config.integer("num_hidden_layers"), config.integer("max_window_layers", 28, least=0)
    on = config.flag("use_sliding_window", False)
    usual = [KINDS[on and layer >= first] for layer in range(layers)]
    kinds = config.words("layer_types", KINDS, usual)
    if len(kinds) != layers:
        raise ValueError(f"{config.name}: layer_types has {len(kinds)} entries; there are {layers} layers")
    near = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    if near and not on:
        raise ValueError(f"{config.name}: layer_types names sliding layers and use_sliding_window is false")
    return near
