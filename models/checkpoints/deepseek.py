"""DeepSeek-V2, https://arxiv.org/abs/2405.04434, and DeepSeek-V3, https://arxiv.org/abs/2412.19437.

Latent attention; the first layers dense, then fine-grained mixtures with shared experts. V2 routes by softmax, V3 by
sigmoids with a balancing bias; both may limit a token to groups of experts. Rotary pairs are neighbours in the files.
"""

import abc
import dataclasses
import re
from collections.abc import Iterator

from ...moe import GroupLimit, LossFree, MoE, Sigmoid, SwiGLU, TopK
from ..decoder import Decoder
from ..ffn import Dense, FirstLayers
from ..latent_attention import LatentAttention
from ..rotary import yarn_magnitude
from .family import Family, frame, gated_tensors, layer_norms, mixture_tensors, rotary
from .fields import Fields
from .llama import decoder_of
from .mapping import FileTensor, Piece, flat, linear, same, turned


class DeepSeek(Family):
    """What the two have in common."""

    first_dense: int
    """Dense layers where the configuration does not say."""

    @abc.abstractmethod
    def router(self, config: Fields) -> TopK:
        """Who chooses the experts."""

    def decoder(self, config: Fields) -> Decoder:
        config.must_be("hidden_act", "silu")
        for field in ("attention_bias", "mlp_bias"):
            config.must_be(field, False)
        config.must_be("moe_layer_freq", 1)
        hidden, shared = config.integer("moe_intermediate_size"), config.integer("n_shared_experts", least=0)
        mixture = MoE(
            experts=config.integer("n_routed_experts"),
            router=self.router(config),
            expert=SwiGLU(hidden=hidden),
            shared=SwiGLU(hidden=shared * hidden) if shared else None,
            losses=(),
        )
        ffn = FirstLayers(
            ffn=mixture,
            first=Dense(hidden=config.integer("intermediate_size")),
            count=config.integer("first_k_dense_replace", self.first_dense, least=0),
        )
        return decoder_of(config, _attention(config), ffn=ffn)

    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        yield from frame(decoder)
        neighbours = config.flag("rope_interleave", True)
        for layer in range(decoder.layers):
            attention, ffn = decoder.attention.at(layer), decoder.ffn.at(layer)
            assert isinstance(attention, LatentAttention)
            yield from layer_norms(layer, decoder.width)
            yield from _attention_tensors(layer, attention, decoder.width, neighbours)
            prefix, path = f"model.layers.{layer}.mlp", f"layers.{layer}.ffn"
            if isinstance(ffn, Dense):
                yield from gated_tensors(prefix, path, decoder.width, ffn.hidden)
                continue
            assert isinstance(ffn, MoE) and isinstance(ffn.expert, SwiGLU) and isinstance(ffn.router, TopK)
            yield from mixture_tensors(prefix, layer, decoder.width, ffn.expert.hidden, ffn.experts)
            if isinstance(ffn.shared, SwiGLU):
                place = f"{prefix}.shared_experts"
                yield from gated_tensors(place, f"{path}.shared", decoder.width, ffn.shared.hidden, index=(0,))
            if ffn.router.balancing is not None:
                bias = f"{prefix}.gate.e_score_correction_bias"
                yield same(bias, f"{path}.router.balancing.bias", (ffn.experts,))

    def left_out(self, name: str, decoder: Decoder) -> bool:
        """Layers past the last predict further tokens (section 2.2 of V3): no part of the model itself."""
        layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
        return super().left_out(name, decoder) or (layer is not None and int(layer[1]) >= decoder.layers)


class DeepSeekV2(DeepSeek):
    """Softmax scores, not renormalised; without groups in V2-Lite."""

    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    first_dense = 0

    def router(self, config: Fields) -> TopK:
        config.must_be("norm_topk_prob", False)
        config.must_be("scoring_func", "softmax")
        method = config.word("topk_method", ("greedy", "group_limited_greedy"), "greedy")
        return TopK(
            k=config.integer("num_experts_per_tok"),
            renormalize=False,
            scale=config.number("routed_scaling_factor", 1.0),
            groups=_groups(config, best=1) if method == "group_limited_greedy" else None,
        )


class DeepSeekV3(DeepSeek):
    """Sigmoid scores, a bias that keeps the loads even, renormalised weights."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    first_dense = 3

    def router(self, config: Fields) -> TopK:
        config.must_be("scoring_func", "sigmoid")
        config.must_be("topk_method", "noaux_tc")
        return TopK(
            k=config.integer("num_experts_per_tok", 8),
            scores=Sigmoid(),
            renormalize=config.flag("norm_topk_prob", True),
            scale=config.number("routed_scaling_factor", 2.5),
            balancing=LossFree(),
            groups=_groups(config, best=2),
        )


def _groups(config: Fields, best: int) -> GroupLimit | None:
    groups = config.integer("n_group", 8)
    chosen = config.integer("topk_group", min(4, groups))
    return None if groups == chosen == 1 else GroupLimit(groups=groups, chosen=chosen, best=best)


def _attention(config: Fields) -> LatentAttention:
    theta, scaling = rotary(config)
    plain, rotary_width = config.integer("qk_nope_head_dim", 128), config.integer("qk_rope_head_dim", 64)
    attention = LatentAttention(
        heads=config.integer("num_attention_heads"),
        latent_width=config.integer("kv_lora_rank", 512),
        query_latent_width=config.integer("q_lora_rank", None),
        plain_width=plain,
        rotary_width=rotary_width,
        value_width=config.integer("v_head_dim", 128),
        rope_theta=theta,
        scaling=scaling,
    )
    rope = config.object("rope_parameters") or config.object("rope_scaling")
    weight = rope.number("mscale_all_dim", 0.0) if rope is not None and scaling is not None else 0.0
    if not weight:
        return attention
    sharper = yarn_magnitude(getattr(scaling, "factor", 1.0), weight) ** 2
    return dataclasses.replace(attention, scale=sharper * (plain + rotary_width) ** -0.5)


def _attention_tensors(layer: int, attention: LatentAttention, width: int, neighbours: bool) -> Iterator[FileTensor]:
    prefix, path = f"model.layers.{layer}.self_attn", f"layers.{layer}.attention"
    heads, latent, rank = attention.heads, attention.latent_width, attention.query_latent_width
    plain, rotary_width, value = attention.plain_width, attention.rotary_width, attention.value_width
    name, source = f"{prefix}.q_proj.weight", (width,)
    if rank is not None:
        yield linear(f"{prefix}.q_a_proj.weight", f"{path}.query_down", (width,), (rank,))
        yield same(f"{prefix}.q_a_layernorm.weight", f"{path}.query_norm.scale", (rank,))
        name, source = f"{prefix}.q_b_proj.weight", (rank,)
    both = (heads, plain + rotary_width)
    pieces = [Piece(f"{path}.query_plain", turned(source, both, (1, 0, plain, 1)))]
    for first, step, start in _rotary_parts(plain, rotary_width, neighbours):
        view = turned(source, both, (1, first, plain + rotary_width, step))
        pieces.append(Piece(f"{path}.query_rotary", view, start=start))
    yield FileTensor(name, flat(both, source), tuple(pieces))

    joined = (latent + rotary_width,)
    pieces = [Piece(f"{path}.latent_down", turned((width,), joined, (0, 0, latent, 1)))]
    for first, step, start in _rotary_parts(latent, rotary_width, neighbours):
        view = turned((width,), joined, (0, first, latent + rotary_width, step))
        pieces.append(Piece(f"{path}.key_rotary", view, start=start))
    yield FileTensor(f"{prefix}.kv_a_proj_with_mqa.weight", flat(joined, (width,)), tuple(pieces))
    yield same(f"{prefix}.kv_a_layernorm.weight", f"{path}.latent_norm.scale", (latent,))

    up = (heads, plain + value)
    keys = Piece(f"{path}.key_plain", turned((latent,), up, (1, 0, plain, 1)))
    values = Piece(f"{path}.value", turned((latent,), up, (1, plain, plain + value, 1)))
    yield FileTensor(f"{prefix}.kv_b_proj.weight", flat(up, (latent,)), (keys, values))
    yield linear(f"{prefix}.o_proj.weight", f"{path}.output", (heads, value), (width,))


def _rotary_parts(begin: int, width: int, neighbours: bool) -> tuple[tuple[int, int, int], ...]:
    """First row, step and place in ours: pairs that are neighbours come apart into two halves."""
    return ((begin, 2, 0), (begin + 1, 2, width // 2)) if neighbours else ((begin, 1, 0),)
