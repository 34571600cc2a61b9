"""What Switch Transformer's arms promise: equal places for top-1 and top-2, and first choices before second ones."""

import jax
import jax.numpy as jnp

from dynamoe.experiments.papers.switch_transformer import top1, top2
from dynamoe.moe import NO_CONTEXT


def test_a_second_choice_is_dropped_for_a_later_first_one(key: jax.Array) -> None:
    # 2 tokens, 2 experts, capacity factor 1.0 as the paper counts it: 1 place an expert. Token 0 prefers expert 0,
    # token 1 expert 1; so both second choices find their expert full, that of token 0 by the later token 1.
    ffn = top2(1.0)
    router = ffn.router.build(width=2, experts=2, key=key)
    router.gate.kernel[...] = jnp.eye(2)
    x = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    plan = ffn.dispatcher.plan(router(x, NO_CONTEXT)[0])
    assert plan.dropped == 0.5
    y = ffn.dispatcher.combine(ffn.dispatcher.dispatch(x, plan), plan)
    # Each token comes back once, by its first choice, with the weight 1 / (1 + e^-1) = 0.7311.
    assert jnp.allclose(y, 0.7311 * x, atol=1e-4)
    assert ffn.looks_ahead and not top1(1.0).looks_ahead


def test_top_2_has_as_many_places_as_top_1() -> None:
    places = [
        ffn.dispatcher.capacity(tokens=4096, assignments=4096 * int(ffn.router.experts_per_token), experts=16)
        for ffn in (top1(1.25), top2(1.25))
    ]
    assert places == [320, 320]
