"""Mixtral: Jiang et al. 2024, https://arxiv.org/abs/2401.04088. Every layer a mixture; softmax over the k best."""

import dataclasses
from collections.abc import Iterator

from ...moe import BalanceLoss, MoE, SwiGLU, TopK
from ..attention import Attention
from ..decoder import Decoder
from .family import Family, attention_tensors, balance_coefficient, frame, layer_norms, router_tensor
from .fields import Fields
from .llama import decoder_of, llama_attention
from .mapping import FileTensor, linear


class Mixtral(Family):
    """See above. w1 is the gate, w3 up and w2 down."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"

    def decoder(self, config: Fields) -> Decoder:
        config.must_be("hidden_act", "silu")
        attention = dataclasses.replace(
            llama_attention(config, default_theta=1_000_000.0, default_kv_heads=8),
            bias=False,
            output_bias=False,
            window=config.integer("sliding_window", None),
        )
        k, layers = config.integer("num_experts_per_tok", 2), config.integer("num_hidden_layers")
        ffn = MoE(
            experts=config.integer("num_local_experts", 8),
            router=TopK(k=k),
            expert=SwiGLU(hidden=config.integer("intermediate_size")),
            losses=(BalanceLoss(coefficient=balance_coefficient(config, k, layers)),),
        )
        return decoder_of(config, attention, ffn=ffn, epsilon=1e-5)

    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        yield from frame(decoder)
        for layer in range(decoder.layers):
            attention, ffn = decoder.attention.at(layer), decoder.ffn.at(layer)
            assert isinstance(attention, Attention) and isinstance(ffn, MoE) and isinstance(ffn.expert, SwiGLU)
            width, hidden, prefix = decoder.width, ffn.expert.hidden, f"model.layers.{layer}.block_sparse_moe"
            yield from layer_norms(layer, width)
            yield from attention_tensors(layer, attention, width)
            yield router_tensor(f"{prefix}.gate.weight", layer, width, ffn.experts)
            for expert in range(ffn.experts):
                for theirs, ours, into, out in (
                    ("w1", "gate", width, hidden),
                    ("w2", "down", hidden, width),
                    ("w3", "up", width, hidden),
                ):
                    name, path = f"{prefix}.experts.{expert}.{theirs}.weight", f"layers.{layer}.ffn.experts.{ours}"
                    yield linear(name, path, (into,), (out,), (expert,))
