"""Self-speculation draws what the full model draws."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dynamoe.dynamic import Exits
from dynamoe.models import Attention, Decoder, Dense
from dynamoe.models.generation import (
    Categorical,
    Engine,
    Greedy,
    RepetitionPenalty,
    Request,
    SelfSpeculationEngine,
    Temperature,
    TopKTokens,
)
from dynamoe.moe import CapacityDispatcher, MoE, SwiGLU, TopK

CONFIG = Decoder(
    vocab=12,
    width=16,
    layers=3,
    attention=Attention(heads=2),
    ffn=Dense(hidden=16),
    exits=Exits(after=(1, 2)),
    residual_scale=0.4,  # so that early exits often agree with the last one
)
PROMPTS = [tuple(np.random.default_rng(0).integers(0, 12, n).tolist()) for n in (3, 4, 3)]


@functools.cache
def model(ffn=CONFIG.ffn):
    return dataclasses.replace(CONFIG, ffn=ffn).build(jax.random.key(0), stacked=False)


def drawn(engine, *, tokens=9, prompts=PROMPTS, **options):
    numbers = [
        engine.submit(Request(prompt=prompt, max_tokens=tokens + n, seed=n, **options))
        for n, prompt in enumerate(prompts)
    ]
    answers = {number: [] for number in numbers}
    for each in engine.run():
        answers[each.request].append(each.token)
    return list(answers.values())


def engine(**options):
    return SelfSpeculationEngine(options.pop("model", None) or model(), slots=16, **({"tokens": 3} | options))


@pytest.mark.parametrize("ffn", [CONFIG.ffn, MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8))])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_answers_are_the_full_models(ffn, rows) -> None:
    found = engine(model=model(ffn), rows=rows)
    assert drawn(found) == drawn(Engine(model(ffn), rows=3, slots=16))
    acceptance = found.acceptance
    assert 0 < acceptance.accepted < acceptance.drafted == 3 * acceptance.rounds
    assert acceptance.tokens_per_round == pytest.approx(1 + 3 * acceptance.rate)


@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_end_where_the_layers_are_not_sure_and_answers_stay_the_same(rows) -> None:
    found, always = engine(rows=rows, threshold=0.1), engine(rows=rows)
    assert drawn(found) == drawn(always)
    assert 0 < found.acceptance.drafted < 3 * found.acceptance.rounds
    assert found.acceptance.rate > always.acceptance.rate
    never = engine(rows=rows, threshold=1.0)
    assert drawn(never) == drawn(always) and never.acceptance.drafted == 0


def test_a_draft_of_all_but_the_last_layer_is_mostly_kept() -> None:
    late, early = engine(after=2), engine(after=1)
    assert drawn(late) == drawn(early)
    assert late.acceptance.rounds < sum(9 + n for n in range(3))


def test_drawn_tokens_have_the_full_models_distribution() -> None:
    filters = (Temperature(value=0.7), TopKTokens(k=5))
    sampler, count = Categorical(filters=filters), 1600
    prompts = [PROMPTS[0]] * count
    seen = []
    for one in (
        engine(rows=8, sampler=sampler, tokens=2, threshold=0.2),
        Engine(model(), rows=8, slots=16, sampler=sampler),
    ):
        answers = np.array(drawn_equal(one, prompts))
        seen.append(np.stack([np.bincount(answers[:, place], minlength=12) / count for place in range(1, 4)]))
    assert np.abs(seen[0] - seen[1]).max() < 5 * (2 * 0.25 / count) ** 0.5


def drawn_equal(engine, prompts):
    for n, prompt in enumerate(prompts):
        engine.submit(Request(prompt=prompt, max_tokens=4, seed=n))
    answers = [[] for _ in prompts]
    for each in engine.run():
        answers[each.request].append(each.token)
    return answers


def test_neighbours_do_not_matter_and_a_seed_repeats() -> None:
    sampler = Categorical()
    alone, together, again = (drawn(engine(rows=rows, sampler=sampler)) for rows in (1, 3, 3))
    assert alone == together == again


def test_stop_tokens_and_the_last_slot_end_a_request() -> None:
    answer = drawn(engine(), prompts=PROMPTS[:1])[0]
    stopped = drawn(engine(), prompts=PROMPTS[:1], stop_tokens=(answer[4],))[0]
    assert stopped == answer[: answer.index(answer[4]) + 1]
    full = Engine(model(), rows=1, slots=16)
    assert drawn(engine(rows=2), tokens=14, prompts=PROMPTS[:1]) == drawn(full, tokens=14, prompts=PROMPTS[:1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: engine(after=3), "after is 3; the model has exits after 1, 2 layers"),
        (lambda: engine(tokens=0), "tokens is 0; it must be at least 1"),
        (lambda: engine(threshold=1.5), "threshold is 1.5; it must be 0 to 1"),
        (
            lambda: engine(model=dataclasses.replace(CONFIG, exits=None).build(jax.random.key(0))),
            "Decoder.exits is None; self-speculation needs a model that was trained with exits",
        ),
        (
            lambda: engine(sampler=Greedy(filters=(RepetitionPenalty(penalty=1.2),))),
            "with drafts no filter may look at the tokens before",
        ),
        (
            lambda: engine(model=model(MoE(experts=4, expert=SwiGLU(hidden=8), dispatcher=CapacityDispatcher()))),
            "depends on the other tokens of the batch",
        ),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
