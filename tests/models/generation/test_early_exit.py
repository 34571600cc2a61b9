"""Early exit against plain loops over the layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import (
    Constant,
    Decaying,
    DeferLayers,
    EarlyExit,
    Exits,
    PerExit,
    RecomputeLayers,
    Top2Gap,
    WholeBatch,
)
from dynamoe.models import Attention, Decoder, Dense, NewTokens
from dynamoe.models.generation import (
    Categorical,
    EarlyExitEngine,
    Engine,
    Greedy,
    RepetitionPenalty,
    Request,
)
from dynamoe.moe import CapacityDispatcher, MoE, SwiGLU, TopK

CONFIG = Decoder(
    vocab=40, width=16, layers=4, attention=Attention(heads=2), ffn=Dense(hidden=16), exits=Exits(after=(1, 2))
)
PROMPTS = [tuple(np.random.default_rng(0).integers(0, 40, n).tolist()) for n in (3, 4, 3)]


@functools.cache
def model(ffn=CONFIG.ffn):
    return dataclasses.replace(CONFIG, ffn=ffn).build(jax.random.key(0), stacked=False)


def drawn(engine, *, tokens=8, prompts=PROMPTS, **options):
    numbers = [
        engine.submit(Request(prompt=prompt, max_tokens=tokens + n, seed=n, **options))
        for n, prompt in enumerate(prompts)
    ]
    answers = {number: [] for number in numbers}
    for each in engine.run():
        answers[each.request].append(each.token)
    return list(answers.values())


def engine(threshold, *, rows=3, **options):
    policy = {name: options.pop(name) for name in ("skipped", "batch", "confidence") if name in options}
    threshold = Constant(threshold=threshold) if isinstance(threshold, float) else threshold
    return EarlyExitEngine(
        options.pop("model", None) or model(), EarlyExit(thresholds=threshold, **policy), rows=rows, slots=32, **options
    )


@functools.cache
def gaps():
    """Confidences of random text, so that thresholds part it."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (4, 12)))
    hidden = model().hidden(tokens)
    logits = model().head(hidden.exits[0], 0).reshape(-1, 40)
    return np.asarray(
        Top2Gap().score(jnp.zeros(len(logits), jnp.int32), logits, hidden.exits[0].reshape(-1, 16), ())[0]
    )


def middle() -> float:
    return float(np.median(gaps()))


@functools.cache
def stage(exit):
    """A jitted stage of the one row, with what is sure of it, and with the layers behind it filled."""
    lm, first, depth = model(), (0, 1, 2)[exit], (1, 2, 4)[exit]

    @jax.jit
    def run(x, new, layers):
        x, written = lm.decode_layers(x, new, layers[first:depth], first=first)
        logits = lm.head(x, exit)[0, 0]
        best = jnp.sort(jax.nn.softmax(logits))
        on = (*layers[:first], *written, *layers[depth:])
        left = (*on[:depth], *lm.remember_layers(x, new, on[depth:], first=depth)) if exit < 2 else on
        return x, logits.argmax(), best[-1] - best[-2], on, left

    return run


def propagated(prompt, count, threshold):
    """One row, layer by layer: CALM."""
    lm, cache = model(), model().empty_cache(batch=1, slots=32)
    x, cache = lm.extend(jnp.asarray([prompt]), cache)
    answer, layers, depths = [int(lm.head(x)[0, -1].argmax())], cache.layers, []
    while len(answer) < count:
        place = jnp.asarray([[len(prompt) + len(answer) - 1]])
        new = NewTokens(jnp.asarray([[answer[-1]]]), place, jnp.ones((1, 1), bool))
        x = lm.embed(new.tokens)
        for exit, depth in enumerate((1, 2, 4)):
            x, token, gap, layers, left = stage(exit)(x, new, layers)
            if exit == 2 or gap >= threshold:
                layers = left
                answer.append(int(token))
                depths.append(depth)
                break
    return answer, depths


@jax.jit
def sure_of(text, last):
    """Token and confidence at each exit of a full forward pass, at the text's last place."""
    hidden = model().hidden(text)
    logits = jnp.stack([model().head(x, exit)[0, last] for exit, x in enumerate((*hidden.exits, hidden.x))])
    best = jnp.sort(jax.nn.softmax(logits))
    return logits.argmax(axis=1), best[:, -1] - best[:, -2]


def exact(prompt, count, threshold):
    """Every token is chosen from a full forward pass over the text so far, at the exit where that is sure."""
    text = list(prompt)
    while len(text) < len(prompt) + count:
        tokens, gaps = sure_of(jnp.asarray([text + [0] * (32 - len(text))]), len(text) - 1)
        sure = np.asarray(gaps) >= threshold
        first = len(text) == len(prompt)  # the prompt goes through all layers
        text.append(int(tokens[2 if first else int(np.argmax([*sure[:2], True]))]))
    return text[len(prompt) :]


@pytest.mark.parametrize("rows", [1, 3])
def test_propagated_states_are_those_of_a_loop_over_layers(rows) -> None:
    found = engine(middle(), rows=rows)
    answers = drawn(found)
    expected = [propagated(prompt, 8 + n, middle()) for n, prompt in enumerate(PROMPTS)]
    assert answers == [answer for answer, _ in expected]
    depths = [depth for _, each in expected for depth in each]
    assert found.depths.tokens == tuple(depths.count(depth) for depth in (1, 2, 4))
    assert len(set(depths)) > 1  # the threshold parts them


@pytest.mark.parametrize("skipped", [DeferLayers(most=7), RecomputeLayers(most=7)])
def test_deferred_layers_see_what_the_full_model_sees(skipped) -> None:
    found = engine(middle(), skipped=skipped)
    assert drawn(found) == [exact(prompt, 8 + n, middle()) for n, prompt in enumerate(PROMPTS)]
    assert 1 < found.depths.mean < 4


def test_a_token_goes_deeper_where_too_many_wait() -> None:
    found = engine(0.0, skipped=DeferLayers(most=3), rows=1)
    drawn(found, prompts=PROMPTS[:1], tokens=13)
    assert found.depths.tokens == (9, 0, 3)  # every fourth: three wait, and it takes them along


@pytest.mark.parametrize("ffn", [CONFIG.ffn, MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8))])
def test_where_nobody_leaves_it_is_the_full_model(ffn) -> None:
    found = engine(PerExit(thresholds=(float("inf"),) * 2), model=model(ffn), skipped=DeferLayers(most=7))
    assert drawn(found) == drawn(Engine(model(ffn), rows=3, slots=32))
    assert found.depths.mean == 4


@pytest.mark.parametrize("sampler", [Greedy(), Categorical()])
def test_neighbours_and_width_change_nothing(sampler) -> None:
    alone = drawn(engine(middle(), rows=1, sampler=sampler))
    assert drawn(engine(middle(), rows=3, width=2, sampler=sampler)) == alone
    assert drawn(engine(middle(), rows=3, sampler=sampler)) == alone


def test_a_whole_batch_leaves_together() -> None:
    found = engine(middle(), batch=WholeBatch())
    drawn(found)
    alone = engine(middle())
    drawn(alone)
    assert found.depths.mean > alone.depths.mean
    one = engine(middle(), batch=WholeBatch(), rows=1)
    assert drawn(one) == drawn(engine(middle(), rows=1))


def test_stop_tokens_and_cancelling_end_a_request() -> None:
    answer = drawn(engine(middle()), prompts=PROMPTS[:1])[0]
    stopped = drawn(engine(middle()), prompts=PROMPTS[:1], stop_tokens=(answer[4],))[0]
    assert stopped == answer[: answer.index(answer[4]) + 1]
    found = engine(middle(), rows=2)
    for prompt in PROMPTS[:3]:
        found.submit(Request(prompt=prompt, max_tokens=8))
    counts = [0, 0, 0]
    for each in found.run():
        counts[each.request] += 1
        if each.request == 0 and counts[0] == 2:
            found.cancel(0)
    assert counts == [2, 8, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(threshold=1.5), "Constant.threshold is 1.5; it must be 0 to 1"),
        (lambda: PerExit(thresholds=(0.5, -1.0)), "PerExit.thresholds is -1.0; it must be 0 to 1"),
        (lambda: Decaying(threshold=0.5, length=0), "Decaying.length is 0"),
        (lambda: DeferLayers(most=0), "DeferLayers.most is 0; it must be at least 1"),
        (lambda: engine(PerExit(thresholds=(0.5,))), "of 1 exits; the model has 2 before the last"),
        (lambda: engine(0.5, width=4), "width is 4 and rows 3; a call has no more rows than there are"),
        (
            lambda: engine(0.5, model=dataclasses.replace(CONFIG, exits=None).build(jax.random.key(0))),
            "Decoder.exits is None; a policy of early exit needs a model that was trained with exits",
        ),
        (
            lambda: engine(0.5, sampler=Greedy(filters=(RepetitionPenalty(penalty=1.2),))),
            "with early exit no filter may look at the tokens before",
        ),
        (
            lambda: engine(0.5, model=model(MoE(experts=4, expert=SwiGLU(hidden=8), dispatcher=CapacityDispatcher()))),
            "depends on the other tokens of the batch",
        ),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
