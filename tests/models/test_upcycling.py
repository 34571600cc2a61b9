"""A dense decoder becomes a mixture: the same logits in every form, and one clear error where it cannot."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import Attention, Decoder, Dense, EveryNth, FirstLayers
from dynamoe.models.decoder import DecoderLM
from dynamoe.models.upcycling import check_upcycling, upcycle
from dynamoe.moe import (
    GELU,
    Copy,
    DenseDispatcher,
    GatedShared,
    GranularSplit,
    LayerPattern,
    MoE,
    NullExperts,
    Router,
    RouterState,
    Routing,
    SwiGLU,
    TopK,
    Upcycling,
)

DENSE = Decoder(vocab=20, width=8, layers=3, attention=Attention(heads=2), ffn=Dense(hidden=12))


def mixture(hidden: int = 12, experts: int = 4, k: int = 2, **options: Any) -> MoE:
    return MoE(experts=experts, router=TopK(k=k), expert=SwiGLU(hidden=hidden), dispatcher=DenseDispatcher(), **options)


def with_ffn(ffn: LayerPattern) -> Decoder:
    return dataclasses.replace(DENSE, ffn=ffn)


TOKENS = np.random.default_rng(0).integers(0, 20, size=(2, 7), dtype=np.int32)


def logits_and_model(
    ffn: LayerPattern, technique: Upcycling, *, stacked: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, DecoderLM]:
    """The logits of the dense model, a fresh one and the upcycled one, and this model; one function to compile."""

    @jax.jit
    def make(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, DecoderLM]:
        dense = DENSE.build(jax.random.key(1))
        fresh = with_ffn(ffn).build(jax.random.key(2), stacked=stacked)
        given = [*jax.tree.leaves(nnx.state(dense)), *jax.tree.leaves(nnx.state(fresh))]
        new = upcycle(dense, fresh, technique, jax.random.key(4))
        after = [*jax.tree.leaves(nnx.state(dense)), *jax.tree.leaves(nnx.state(fresh))]
        assert all(a is b for a, b in zip(given, after, strict=True)), "the models that are given stay as they are"
        # The same tree as a fresh model, to the logical axes: it takes the place of one in a training state.
        assert jax.tree.structure(nnx.state(new)) == jax.tree.structure(nnx.state(fresh))
        assert nnx.graphdef(new) == nnx.graphdef(fresh)
        return dense(tokens).logits, fresh(tokens).logits, new(tokens).logits, new

    dense, fresh, new, model = make(jnp.asarray(TOKENS))
    return np.asarray(dense), np.asarray(fresh), np.asarray(new), model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest(Router):
    """A router of the user's own, without a `Gate`, that remembers something."""

    experts_per_token = 1.0
    weight_sum = 1.0

    def build(self, *, width: int, experts: int, key: jax.Array) -> "NearestRouter":
        return NearestRouter(width, experts, key)


class NearestRouter(nnx.Module):
    def __init__(self, width: int, experts: int, key: jax.Array):
        self.kernel = nnx.Param(jax.random.normal(key, (width, experts)), axes=("embed", None))
        self.bias = RouterState(jnp.arange(experts, dtype=jnp.float32), axes=(None,))

    def __call__(self, x: jax.Array, context: Any) -> tuple[Routing, None]:
        logits = x @ self.kernel[...] + self.bias[...][None]
        expert = logits.argmax(axis=1).astype(jnp.int32)
        return Routing(expert, jnp.ones(expert.shape), None, logits, jax.nn.softmax(logits, axis=-1)), None


NEAREST = MoE(experts=3, router=Nearest(), expert=SwiGLU(hidden=12), dispatcher=DenseDispatcher())
KEEPING: dict[str, tuple[LayerPattern, Upcycling, bool, int]] = {
    "with a shared expert": (mixture(shared=GatedShared(expert=SwiGLU(hidden=5))), Copy(), True, 1),
    "after the first": (FirstLayers(ffn=mixture(6), first=Dense(hidden=12)), GranularSplit(shards=2), True, 2),
    "another router, unstacked": (EveryNth(ffn=NEAREST, otherwise=Dense(hidden=12)), Copy(), False, 3),
}


@pytest.mark.parametrize("case", KEEPING)
def test_the_logits_are_those_of_the_dense_model(case: str) -> None:
    ffn, technique, stacked, segments = KEEPING[case]
    dense, fresh, new, model = logits_and_model(ffn, technique, stacked=stacked)
    assert len(model.segments) == segments
    assert np.abs(fresh - dense).max() > 0.1
    np.testing.assert_allclose(new, dense, rtol=1e-4, atol=1e-5)
    if case == "with a shared expert":
        shared = model.segments[0].unit.layers[0].ffn.shared.expert  # type: ignore
        assert not shared.down[...].any(), "it adds nothing"
        assert shared.gate[...].any() and shared.up[...].any(), "but it can learn"
    if case == "another router, unstacked":
        bias = model.segments[1].unit.layers[0].ffn.router.bias  # type: ignore
        np.testing.assert_array_equal(bias[...], [0, 1, 2])


def test_a_router_without_a_gate_is_refused_where_its_weights_are_set() -> None:
    with pytest.raises(ValueError, match="layer 0: .*Nearest.* has no single Gate"):
        check_upcycling(DENSE, with_ffn(NEAREST), GranularSplit(shards=1))


REFUSED: dict[str, tuple[Decoder, Decoder, Upcycling, str]] = {
    "a mixture": (with_ffn(mixture()), with_ffn(mixture()), Copy(), "layer 0 is a mixture already, 4 experts"),
    "no mixture": (DENSE, DENSE, Copy(), "upcycling needs an MoE in one layer or more"),
    "another width": (
        DENSE,
        dataclasses.replace(with_ffn(mixture()), width=16),
        Copy(),
        "model.width is 16, and 8 in the dense model",
    ),
    "another dense layer": (
        DENSE,
        with_ffn(FirstLayers(ffn=mixture(), first=Dense(hidden=10))),
        Copy(),
        "layer 0 is Dense.hidden=10, .*, and Dense.hidden=12, .* in the dense model",
    ),
    "narrow experts": (
        DENSE,
        with_ffn(FirstLayers(ffn=mixture(10), first=Dense(hidden=12))),
        Copy(),
        r"layer 1: MoE.expert is SwiGLU.* up \[4, 8, 10\]; the technique makes .* up \[4, 8, 12\]",
    ),
    "experts without a gate": (
        DENSE,
        with_ffn(MoE(experts=2, expert=GELU(hidden=12))),
        Copy(),
        r"layer 0: MoE.expert is GELU.* the technique makes .*gate",
    ),
    "a gate that is wider": (
        DENSE,
        with_ffn(MoE(experts=4, router=NullExperts(null_experts=2), expert=SwiGLU(hidden=6), losses=())),
        GranularSplit(shards=2, scale=2.0),
        r"layer 0: MoE.router is NullExperts.* whose gate is \[8, 6\]; GranularSplit makes one of \[8, 4\]",
    ),
    "shards": (
        DENSE,
        with_ffn(mixture(6, experts=5)),
        GranularSplit(shards=2),
        "layer 0: GranularSplit.shards is 2 and MoE.experts 5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_without_computing(case: str, unchecked: None) -> None:
    before, after, technique, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_upcycling(before, after, technique)


def test_the_layers_that_change_are_told() -> None:
    config = with_ffn(FirstLayers(ffn=mixture(), first=Dense(hidden=12)))
    assert check_upcycling(DENSE, dataclasses.replace(config, dtype="bfloat16", remat=True), Copy()) == (1, 2)
