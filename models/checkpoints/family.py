"""What a model family is: from its configuration to our types, and from its tensors to our arrays.

Letters: D width, H query heads, G key-value heads, P head width, F hidden width, E experts.
"""

import abc
from collections.abc import Iterator

from ..attention import Attention
from ..decoder import Decoder, DecoderLM
from ..rotary import DynamicNTK, LinearScaling, Llama3Scaling, RotaryScaling, Yarn, yarn_magnitude
from .fields import Fields
from .mapping import FileTensor, interleaved, linear, same


class Family(abc.ABC):
    """One architecture of published models. Its file is named after it."""

    model_type: str
    """Of config.json."""
    architecture: str
    """The class in transformers."""
    quantizations: tuple[str, ...] = ()
    """Kinds of packed weights in the files that are known (`quant_method`); others are refused."""

    @abc.abstractmethod
    def decoder(self, config: Fields) -> Decoder:
        """Our configuration. Raises ValueError where a value is missing, wrong or not built here."""

    @abc.abstractmethod
    def tensors(self, config: Fields, decoder: Decoder) -> Iterator[FileTensor]:
        """Every tensor of such a model, in any order, one after another: `decoder` may claim more layers than fit."""

    def left_out(self, name: str, decoder: Decoder) -> bool:
        """Whether a tensor of such files is no weight of the model: it is neither read nor written."""
        return name.endswith(".rotary_emb.inv_freq")

    def prepared(self, model: DecoderLM, config: Fields) -> DecoderLM:
        """The model, in abstract, with what the configuration of a decoder does not say: packed weights."""
        return model


def rotary(config: Fields, default_theta: float = 10_000.0) -> tuple[float, RotaryScaling | None]:
    """The rotary base and its scaling, out of `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""
    rope = config.object("rope_parameters") or config.object("rope_scaling") or Fields({}, config.name)
    theta = rope.number("rope_theta", config.number("rope_theta", default_theta))
    if theta <= 1:
        raise ValueError(f"{config.name}: rope_theta is {theta}; it must be above 1")
    rope.must_be("partial_rotary_factor", 1.0, float(config.number("partial_rotary_factor", 1.0)))
    kinds = ("default", "linear", "dynamic", "llama3", "yarn")
    kind = rope.word("rope_type", kinds, rope.word("type", kinds, "default"))
    length = config.integer("max_position_embeddings", 2048)
    trained = rope.integer("original_max_position_embeddings", length)
    if kind == "linear":
        return theta, LinearScaling(factor=rope.number("factor"))
    if kind == "dynamic":
        return theta, DynamicNTK(factor=rope.number("factor"), trained=length)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return theta, Llama3Scaling(factor=rope.number("factor"), trained=trained, low=low, high=high)
    return theta, _yarn(rope, length, trained) if kind == "yarn" else None


def _yarn(rope: Fields, length: int, trained: int) -> Yarn:
    factor = rope.number("factor", length / trained)
    attention, weight, whole = (rope.number(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None and weight and whole:
        attention = yarn_magnitude(factor, weight) / yarn_magnitude(factor, whole)
    return Yarn(
        factor=factor,
        trained=trained,
        fast=rope.number("beta_fast", 32.0),
        slow=rope.number("beta_slow", 1.0),
        whole_pairs=rope.flag("truncate", True),
        attention=attention,
    )


def frame(decoder: Decoder) -> Iterator[FileTensor]:
    """Embedding, last norm and head, under the names that all families share."""
    shape = (decoder.vocab, decoder.width)
    yield same("model.embed_tokens.weight", "embedding", shape)
    yield same("model.norm.weight", "final_norm.scale", (decoder.width,))
    if decoder.tied:
        yield FileTensor("lm_head.weight", shape, (), same_as="model.embed_tokens.weight")
    else:
        yield linear("lm_head.weight", "head_kernel", (decoder.width,), (decoder.vocab,))


def layer_norms(layer: int, width: int) -> Iterator[FileTensor]:
    """The norms before attention and before the feed-forward network."""
    yield same(f"model.layers.{layer}.input_layernorm.weight", f"layers.{layer}.attention_norm.scale", (width,))
    yield same(f"model.layers.{layer}.post_attention_layernorm.weight", f"layers.{layer}.ffn_norm.scale", (width,))


def attention_tensors(
    layer: int, attention: Attention, width: int, *, neighbours: bool = False
) -> Iterator[FileTensor]:
    """Grouped-query attention as Llama names it. `neighbours`: the rotary pairs stand side by side in the file."""
    heads, kv_heads, head_width = attention.shape(width)
    prefix, path = f"model.layers.{layer}.self_attn", f"layers.{layer}.attention"
    for ours, theirs, count in (("query", "q", heads), ("key", "k", kv_heads), ("value", "v", kv_heads)):
        name = f"{prefix}.{theirs}_proj.weight"
        if neighbours and ours != "value":
            yield interleaved(name, f"{path}.{ours}", (width,), count, head_width)
        else:
            yield linear(name, f"{path}.{ours}", (width,), (count, head_width))
        if attention.bias:
            yield linear(f"{prefix}.{theirs}_proj.bias", f"{path}.{ours}_bias", (), (count, head_width))
    yield linear(f"{prefix}.o_proj.weight", f"{path}.output", (heads, head_width), (width,))
    if attention.output_bias:
        yield same(f"{prefix}.o_proj.bias", f"{path}.output_bias", (width,))
    if attention.qk_norm or attention.projection_norm:
        together = (heads, kv_heads) if attention.projection_norm else (1, 1)
        for ours, theirs, count in zip(("query", "key"), ("q", "k"), together, strict=True):
            yield same(f"{prefix}.{theirs}_norm.weight", f"{path}.{ours}_norm.scale", (count * head_width,))
    if attention.sinks:
        yield same(f"{prefix}.sinks", f"{path}.sinks", (heads,))


def gated_tensors(
    prefix: str, path: str, width: int, hidden: int, *, index: tuple[int, ...] = (), bias: bool = False
) -> Iterator[FileTensor]:
    """gate_proj, up_proj and down_proj of a dense network, or of one expert, `index`."""
    for name, inputs, outputs in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
        yield linear(f"{prefix}.{name}_proj.weight", f"{path}.{name}", (inputs,), (outputs,), index)
        if bias:
            yield same(f"{prefix}.{name}_proj.bias", f"{path}.{name}_bias", (outputs,), index)


def router_tensor(name: str, layer: int, width: int, experts: int) -> FileTensor:
    """The linear map of a router."""
    return linear(name, f"layers.{layer}.ffn.router.gate.kernel", (width,), (experts,))


def mixture_tensors(
    prefix: str, layer: int, width: int, hidden: int, experts: int, *, gate: str = "gate"
) -> Iterator[FileTensor]:
    """A router and experts of three matrices each, as most families name them."""
    yield router_tensor(f"{prefix}.{gate}.weight", layer, width, experts)
    for expert in range(experts):
        place = f"{prefix}.experts.{expert}"
        yield from gated_tensors(place, f"layers.{layer}.ffn.experts", width, hidden, index=(expert,))


def balance_coefficient(config: Fields, k: int, layers: int, default: float = 0.001) -> float:
    """Of our loss, a mean over assignments summed over layers; transformers' is k times larger, and one of all layers
    together."""
    return config.number("router_aux_loss_coef", default) * k / max(layers, 1)
