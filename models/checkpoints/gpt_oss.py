"""gpt-oss. OpenAI 2025, https://arxiv.org/abs/2508.10925. Windows in every second layer, attention sinks, clamped gated
experts with biases, whose matrices are mxfp4 in the published files and stay so."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ...kernels.quantized import MXFP4
from ...moe import BalanceLoss, ClampedSwiGLU, MoE, TopK, quantize_experts
from ..attention import Attention
from ..decoder import Decoder, DecoderLM
from ..self_attention import AttentionAtLayers
from .family import Family, attention_tensors, balance_coefficient, frame, layer_norms, router_tensor
from .fields import Fields
from .llama import decoder_of, llama_attention
from .mapping import FileTensor, Piece, View, same

KINDS = ("full_attention", "sliding_attention")
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(Family):
    """See above. Columns of gate and up alternate in the files."""

    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"
    quantizations = ("mxfp4",)

    def decoder(self, config: Fields) -> Decoder:
        if config.object("rope_parameters") is None and config.object("rope_scaling") is None:
            theta = config.number("rope_theta", ROPE["rope_theta"])
            config = Fields({**config.values, "rope_parameters": {**ROPE, "rope_theta": theta}}, config.name)
        biased = config.flag("attention_bias", True)
        full = llama_attention(config, default_theta=ROPE["rope_theta"], default_kv_heads=8, default_head_width=64)
        full = dataclasses.replace(full, bias=biased, output_bias=biased, sinks=True)
        near = dataclasses.replace(full, window=config.integer("sliding_window", 128))
        k, layers = config.integer("num_experts_per_tok", 4), config.integer("num_hidden_layers")
        kinds = config.words("layer_types", KINDS, [KINDS[(layer + 1) % 2] for layer in range(layers)])
        if len(kinds) != layers:
            raise ValueError(f"{config.name}: layer_types has {len(kinds)} entries; there are {layers} layers")
        sliding = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
        ffn = MoE(
            experts=config.integer("num_local_experts", config.integer("num_experts", 128)),
            router=TopK(k=k, gate_bias=True),
            expert=ClampedSwiGLU(
                hidden=config.integer("intermediate_size"),
                alpha=config.number("swiglu_alpha", 1.702),
                limit=config.number("swiglu_limit", 7.0),
            ),
            losses=(BalanceLoss(coefficient=balance_coefficient(config, k, layers)),),
        )
        attention = AttentionAtLayers(attention=near, layers=sliding, otherwise=full)
        return decoder_of(config, attention, ffn=ffn, epsilon=1e-5)

    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        yield from frame(decoder)
        packed = config.object("quantization_config") is not None
        for layer in range(decoder.layers):
            attention, ffn = decoder.attention.at(layer), decoder.ffn.at(layer)
            assert isinstance(attention, Attention) and isinstance(ffn, MoE) and isinstance(ffn.expert, ClampedSwiGLU)
            width, hidden, experts = decoder.width, ffn.expert.hidden, ffn.experts
            prefix, path = f"model.layers.{layer}.mlp", f"layers.{layer}.ffn"
            yield from layer_norms(layer, width)
            yield from attention_tensors(layer, attention, width)
            yield router_tensor(f"{prefix}.router.weight", layer, width, experts)
            yield same(f"{prefix}.router.bias", f"{path}.router.gate.bias", (experts,))
            yield from (_packed if packed else _plain)(f"{prefix}.experts", f"{path}.experts", experts, width, hidden)
            both = (experts, 2 * hidden)
            biases = _alternating(f"{path}.experts", "_bias", View(both, (0, 1)), 1)
            yield FileTensor(f"{prefix}.experts.gate_up_proj_bias", both, biases)
            yield same(f"{prefix}.experts.down_proj_bias", f"{path}.experts.down_bias", (experts, width))

    def prepared(self, model: DecoderLM, config: Fields) -> DecoderLM:
        if config.object("quantization_config") is None:
            return model
        for segment in model.segments:
            for block in segment.unit.layers:
                layer: Any = block
                layer.ffn.experts = quantize_experts(layer.ffn.experts, MXFP4)
        return model


def _alternating(path: str, tail: str, view: View, axis: int) -> tuple[Piece, Piece]:
    """Gate from the even places of an axis, up from the odd ones."""
    length = view.split[axis]
    gate, up = (dataclasses.replace(view, take=(axis, odd, length, 2)) for odd in (0, 1))
    return Piece(f"{path}.gate{tail}", gate), Piece(f"{path}.up{tail}", up)


def _plain(name: str, path: str, experts: int, width: int, hidden: int) -> Iterator[FileTensor]:
    """Matrices [in, out]."""
    both = (experts, width, 2 * hidden)
    yield FileTensor(f"{name}.gate_up_proj", both, _alternating(path, "", View(both, (0, 1, 2)), 2))
    yield same(f"{name}.down_proj", f"{path}.down", (experts, hidden, width))


def _packed(name: str, path: str, experts: int, width: int, hidden: int) -> Iterator[FileTensor]:
    """Blocks of 32 along the inputs, two codes a byte as ours, and a power of two for each."""
    for part, size, kind in (("blocks", 2, ".codes"), ("scales", 32, ".scales")):
        tail = (16,) if part == "blocks" else ()
        both = (experts, 2 * hidden, width // size)
        view = View(both, (0, 2, 1))
        shape = (experts, 2 * hidden, width // 32, *tail)
        yield FileTensor(f"{name}.gate_up_proj_{part}", shape, _alternating(path, kind, view, 1))
        view = View((experts, width, hidden // size), (0, 2, 1))
        shape = (experts, width, hidden // 32, *tail)
        yield FileTensor(f"{name}.down_proj_{part}", shape, (Piece(f"{path}.down{kind}", view),))
