"""Costs: against array sizes, against the matrix products of the traced program, and by hand."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dynamoe.models import Attention, Decoder, Dense, EveryNth, FirstLayers
from dynamoe.models.accounting import count_parts
from dynamoe.moe import Experts, FeedForward, MoE, SoftMoE, SwiGLU, TopK

S = 12
MOE = MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8))
DENSE = Decoder(
    vocab=40, width=16, layers=5, attention=Attention(heads=4, kv_heads=2, qk_norm=True), ffn=Dense(hidden=24)
)
MODELS = {
    "dense": DENSE,
    "tied": Decoder(vocab=40, width=16, layers=2, tied=True, attention=Attention(heads=2, head_width=6)),
    "two dense networks": Decoder(
        vocab=24, width=16, layers=4, ffn=EveryNth(ffn=Dense(hidden=8), otherwise=Dense(hidden=24))
    ),
    "soft mixture": Decoder(
        vocab=40,
        width=16,
        layers=2,
        ffn=EveryNth(ffn=SoftMoE(experts=3, slots=2, expert=SwiGLU(hidden=8)), otherwise=Dense(hidden=8)),
        allow_look_ahead=True,
    ),
    "mixture after dense": Decoder(vocab=24, width=16, layers=3, ffn=FirstLayers(ffn=MOE, first=Dense(hidden=24))),
}


def matmul_flops(jaxpr):
    """Twice the multiplications of every contraction, those in a scan as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted = [eqn.invars[0].aval.shape[axis] for axis in eqn.params["dimension_numbers"][0][0]]
            # Without a contracted axis it is a pointwise product.
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(contracted) if contracted else 0
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: hasattr(value, "jaxpr")):
            if hasattr(value, "jaxpr"):
                total += times * matmul_flops(value.jaxpr)
    return total


@pytest.mark.parametrize("name", ["dense", "tied", "two dense networks", "soft mixture"])
def test_flops_of_a_model_without_choices_are_those_of_its_traced_program(name):
    graph, state = nnx.split(nnx.eval_shape(lambda: MODELS[name].build(jax.random.key(0))))
    tokens = jnp.zeros((1, S), jnp.int32)
    traced = jax.make_jaxpr(lambda state: nnx.merge(graph, state)(tokens).logits)(state)
    assert count_parts(MODELS[name], S)[-1].flops == matmul_flops(traced.jaxpr) / S


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_parameters_are_the_sizes_of_the_models_arrays(config):
    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: config.build(jax.random.key(0)))))
    *parts, total = count_parts(config, S)
    assert total.name == "total" and total.parameters == sum(math.prod(shape.shape) for shape in shapes)
    for column in ("parameters", "active_parameters", "flops"):
        assert sum(getattr(part, column) for part in parts) == getattr(total, column)


def test_a_mixture_by_hand():
    # One layer, D = 16, H = 2, G = 1, P = 4, E = 4, K = 2, F = 8, V = 24, S = 12.
    config = Decoder(vocab=24, width=16, layers=1, attention=Attention(heads=2, kv_heads=1, head_width=4), ffn=MOE)
    expected = {
        "embedding": (24 * 16, 24 * 16, 0),
        # Query and output 16 * 2 * 4 each, key and value 16 * 1 * 4 each: 384; two operations per parameter.
        "attention": (384, 384, 768),
        # 2 * S * H * P for the scores, as much for the values: 4 * 12 * 2 * 4.
        "attention scores": (0, 0, 384),
        "router": (64, 64, 128),
        # Three matrices of 16 * 8 in each of 4 experts: 1536, of which 2 / 4 run.
        "experts": (1536, 768, 1536),
        "norms": (48, 48, 0),
        "head": (384, 384, 768),
        "total": (2800, 2032, 3584),
    }
    assert {part.name: tuple(part[1:]) for part in count_parts(config, S)} == expected


@dataclass(frozen=True, kw_only=True)
class Biased(FeedForward):
    """A user's network: one matrix, one bias."""

    def build(self, *, width, key):
        return BiasedLayer(width)


class BiasedLayer(nnx.Module):
    def __init__(self, width):
        self.kernel, self.bias = nnx.Param(jnp.zeros((width, width))), nnx.Param(jnp.zeros(width))


@dataclass(frozen=True, kw_only=True)
class BiasedExperts(Experts):
    """A user's experts: one matrix and one bias each."""

    def build(self, *, experts, width, key):
        return BiasedExpertsLayer(experts, width)


class BiasedExpertsLayer(nnx.Module):
    def __init__(self, experts, width):
        self.kernel = nnx.Param(jnp.zeros((experts, width, width)), axes=("expert", "embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros((experts, width)), axes=("expert", "mlp"))

    def __call__(self, rows, group_sizes):
        return rows


def test_a_bias_has_parameters_but_no_matrix_product():
    def part(ffn, name):
        return {part.name: part for part in count_parts(Decoder(width=16, layers=1, ffn=ffn), S)}[name]

    assert part(Biased(), "ffn")[1:] == (16 * 16 + 16, 16 * 16 + 16, 2 * 16 * 16)
    experts = part(MoE(experts=4, router=TopK(k=1, renormalize=False), expert=BiasedExperts()), "experts")
    assert experts[1:] == (4 * (16 * 16 + 16), 16 * 16 + 16, 2 * 16 * 16)


def test_a_sequence_below_one_token_is_refused():
    with pytest.raises(ValueError, match="sequence_length is 0; it must be at least 1"):
        count_parts(DENSE, 0)
