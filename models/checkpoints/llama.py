"""Llama 1 to 3: Touvron et al. 2023, https://arxiv.org/abs/2302.13971; Grattafiori et al. 2024,
https://arxiv.org/abs/2407.21783."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..attention import Attention
from ..decoder import Decoder
from ..ffn import Dense
from .family import Family, attention_tensors, frame, gated_tensors, layer_norms, rotary
from .fields import Fields
from .mapping import FileTensor


@dataclass(frozen=True)
class Llama(Family):
    """Dense, pre-norm, grouped-query attention."""

    neighbours: bool = False
    """The rotary pairs stand side by side in the file, as in llama2.c's."""
    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def decoder(self, config: Fields) -> Decoder:
        config.must_be("hidden_act", "silu")
        hidden, bias = config.integer("intermediate_size"), config.flag("mlp_bias", False)
        return decoder_of(config, llama_attention(config), ffn=Dense(hidden=hidden, bias=bias))

    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        yield from frame(decoder)
        for layer in range(decoder.layers):
            attention, ffn = dense_layer(decoder, layer)
            yield from layer_norms(layer, decoder.width)
            yield from attention_tensors(layer, attention, decoder.width, neighbours=self.neighbours)
            prefix, path = f"model.layers.{layer}.mlp", f"layers.{layer}.ffn"
            yield from gated_tensors(prefix, path, decoder.width, ffn.hidden, bias=ffn.bias)


def llama_attention(
    config: Fields,
    *,
    default_theta: float = 10_000.0,
    default_kv_heads: int | None = None,
    default_head_width: int | None = None,
) -> Attention:
    """Attention with the fields that most families share. Defaults are what a field means that is left out."""
    theta, scaling = rotary(config, default_theta)
    heads = config.integer("num_attention_heads")
    bias = config.flag("attention_bias", False)
    return Attention(
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads if default_kv_heads is None else default_kv_heads),
        head_width=config.integer("head_dim", default_head_width),
        rope_theta=theta,
        scaling=scaling,
        bias=bias,
        output_bias=bias,
    )


def decoder_of(config: Fields, attention: Any, *, ffn: Any, epsilon: float = 1e-6) -> Decoder:
    """A decoder with the fields that most families share."""
    return Decoder(
        vocab=config.integer("vocab_size"),
        width=config.integer("hidden_size"),
        layers=config.integer("num_hidden_layers"),
        attention=attention,
        ffn=ffn,
        tied=config.flag("tie_word_embeddings", False),
        norm_epsilon=config.number("rms_norm_eps", epsilon),
    )


def dense_layer(decoder: Decoder, layer: int) -> tuple[Attention, Dense]:
    """The two parts of a dense layer."""
    attention, ffn = decoder.attention.at(layer), decoder.ffn.at(layer)
    assert isinstance(attention, Attention) and isinstance(ffn, Dense)
    return attention, ffn
