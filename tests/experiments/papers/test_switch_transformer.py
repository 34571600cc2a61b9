"""The router that Switch Transformer is compared with gives places to first choices first."""

import jax
import jax.numpy as jnp

from dynamoe.experiments.papers.switch_transformer import FirstChoicesFirst, top1, top2
from dynamoe.moe import NO_CONTEXT, TopK


def test_all_first_choices_stand_before_any_second(key: jax.Array) -> None:
    config = FirstChoicesFirst()
    router = config.build(width=4, experts=4, key=key)
    x = jax.random.normal(key, (3, 4))
    routing, state = router(x, NO_CONTEXT)
    usual, _ = router.top_k(x, NO_CONTEXT)
    assert state is None and routing.token is not None
    assert routing.token.tolist() == [0, 1, 2, 0, 1, 2]
    # Token by token, a token's best expert first: first choices are at 0, 2, 4, second ones at 1, 3, 5.
    order = jnp.array([0, 2, 4, 1, 3, 5])
    assert routing.expert.tolist() == usual.expert[order].tolist()
    assert routing.weight.tolist() == usual.weight[order].tolist()


def test_a_second_choice_is_dropped_for_a_later_first_one(key: jax.Array) -> None:
    # 2 tokens, 2 experts, capacity factor 1.0 as the paper counts it: 1 place an expert. Token 0 prefers expert 0,
    # token 1 expert 1; so both second choices find their expert full, that of token 0 by the later token 1.
    router = FirstChoicesFirst().build(width=2, experts=2, key=key)
    router.top_k.gate.kernel[...] = jnp.eye(2)
    x = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    ffn = top2(1.0)
    routing, _ = router(x, NO_CONTEXT)
    plan = ffn.dispatcher.plan(routing)
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
    assert places == [320, 320] and isinstance(top2(1.25).router.top_k, TopK)
