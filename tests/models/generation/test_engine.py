"""The engine: greedy against a loop over full forward passes, alone, beside others, in chunks and on a mesh."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import Attention, Decoder, FirstLayers, Layout, MeshShape
from dynamoe.models.ffn import Dense
from dynamoe.models.generation import Categorical, Drawn, Engine, Finish, Greedy, RepetitionPenalty, Request
from dynamoe.moe import (
    AllToAll,
    BatchPriority,
    CapacityDispatcher,
    ExpertChoice,
    ExpertParallel,
    MoE,
    RaggedAllToAll,
    Random,
    SwiGLU,
    TopK,
)

V, SLOTS, CHUNK = 24, 48, 16
EXPERTS = MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8))
CONFIG = Decoder(
    vocab=V,
    width=16,
    layers=3,
    attention=Attention(heads=4, kv_heads=2),
    ffn=FirstLayers(ffn=EXPERTS, first=Dense(hidden=24)),
)


def prompt(length, seed):
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, V, length))


# One shorter than a chunk, one of just a chunk, one of several.
REQUESTS = [
    Request(prompt=prompt(length, seed), max_tokens=tokens, seed=seed)
    for seed, (length, tokens) in enumerate([(3, 9), (16, 5), (37, 7), (7, 1), (20, 12), (1, 6), (33, 3), (2, 10)])
]


def randomized(config):
    model = nnx.eval_shape(lambda: config.build(jax.random.key(0)))
    noise = np.random.default_rng(1)
    # Large weights, so that what comes next depends on all that came before.
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(jnp.asarray(noise.normal(size=variable.get_value().shape), jnp.float32))
    return model


@pytest.fixture(scope="module")
def model():
    return randomized(CONFIG)


def engine(model, *, rows=3, sampler=None, **options):
    return Engine(model, **({"rows": rows, "slots": SLOTS, "chunk": CHUNK, "sampler": sampler} | options))


def answers(engine: Engine, requests) -> list[list[int]]:
    first = engine.submit(requests[0])
    for request in requests[1:]:
        engine.submit(request)
    found: dict[int, list[Drawn]] = defaultdict(list)
    for drawn in engine.run():
        found[drawn.request - first].append(drawn)
    for drawns in found.values():
        assert all(drawn.finish is None for drawn in drawns[:-1]) and drawns[-1].finish is not None
    return [[drawn.token for drawn in found[number]] for number in range(len(requests))]


@pytest.fixture(scope="module")
def together(model):
    return answers(engine(model), REQUESTS)


def continued_by_full_passes(model, request):
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens).logits)
    sequence = list(request.prompt)
    for _ in range(request.max_tokens):
        # Padded to one length: what comes later does not matter to a causal model.
        padded = np.zeros((1, SLOTS), np.int32)
        padded[0, : len(sequence)] = sequence
        sequence.append(int(forward(state, padded)[0, len(sequence) - 1].argmax()))
    return sequence[len(request.prompt) :]


@pytest.mark.smoke
def test_greedy_equals_a_loop_over_full_forward_passes(model, together):
    assert together == [continued_by_full_passes(model, request) for request in REQUESTS]
    assert len({token for answer in together for token in answer}) > 5  # else this test would see little


def test_a_request_alone_in_any_row_draws_what_it_draws_beside_seven_others(model):
    request, others = REQUESTS[4], [REQUESTS[i] for i in (0, 1, 2, 3, 5, 6, 7)]
    for sampler in (Greedy(), Categorical()):
        shared = engine(model, rows=8, sampler=sampler)
        alone = answers(shared, [request])[0]
        assert len(alone) == request.max_tokens
        for place in (0, 3, 7):
            requests = [*others[:place], request, *others[place:]]
            assert answers(shared, requests)[place] == alone


def test_the_same_seed_draws_the_same_and_another_seed_something_else(model):
    warm = engine(model, sampler=Categorical())
    requests = [dataclasses.replace(REQUESTS[4], seed=seed) for seed in (5, 6, 5)]
    first, other, again = answers(warm, requests)
    assert first == again != other
    assert answers(warm, requests[::-1]) == [first, other, first]


def test_pieces_of_any_size_of_a_prompt_give_the_same_answer(model, together):
    for options in ({"chunk": 3}, {"chunk": SLOTS}, {"chunks_between_steps": 1}):
        assert answers(engine(model, **options), REQUESTS[:3]) == together[:3]


def test_long_prompts_do_not_hold_up_others_where_so_configured(model):
    def order(between):
        shared = engine(model, rows=2, chunk=4, chunks_between_steps=between)
        first, second = shared.submit(REQUESTS[0]), shared.submit(REQUESTS[2])
        return [drawn.request for drawn in shared.run()], first, second

    requests, first, second = order(None)
    assert requests.index(second) == 1
    requests, first, second = order(1)
    assert requests[:8] == [first] * 8 and second in requests


def test_a_stop_token_ends_a_request_and_frees_its_row(model, together):
    stop = together[4][3]
    request = dataclasses.replace(REQUESTS[4], stop_tokens=(stop, V - 1))
    shared = engine(model, rows=1)
    found = answers(shared, [request, REQUESTS[0]])
    assert found[0] == together[4][: together[4].index(stop) + 1]
    assert found[1] == together[0]
    shared.submit(request)
    assert [drawn.finish for drawn in shared.run()][-1] is Finish.STOP


def test_requests_may_come_and_go_while_others_run(model, together):
    shared = engine(model, rows=2)
    first, cancelled, waiting = (shared.submit(REQUESTS[number]) for number in (4, 2, 1))
    found = defaultdict(list)
    for drawn in shared.run():
        found[drawn.request].append(drawn.token)
        if drawn.request == cancelled and len(found[cancelled]) == 2:
            shared.cancel(cancelled)
            late = shared.submit(REQUESTS[0])
    assert found == {first: together[4], cancelled: together[2][:2], waiting: together[1], late: together[0]}


def test_a_run_that_was_left_goes_on_where_it_was(model, together):
    shared = engine(model)
    for request in REQUESTS[:3]:
        shared.submit(request)
    found = defaultdict(list)
    while left := list(itertools.islice(shared.run(), 2)):
        for drawn in left:
            found[drawn.request].append(drawn.token)
    assert [found[number] for number in range(3)] == together[:3]


def test_a_row_forgets_the_request_before(model, together):
    """Its tokens, and what a repetition penalty saw of it."""
    sampler = Greedy(filters=(RepetitionPenalty(penalty=5.0),))
    fresh = answers(engine(model, rows=1, sampler=sampler), [REQUESTS[0]])[0]
    used = engine(model, rows=1, sampler=sampler)
    assert answers(used, [REQUESTS[2], REQUESTS[0]])[1] == fresh != together[0]


def test_ids_past_the_tokenizers_vocabulary_are_never_drawn(model):
    drawn = answers(engine(model, sampler=Categorical(), vocab=5), REQUESTS)
    assert max(token for answer in drawn for token in answer) < 5


def test_tokens_of_prompts_and_answers_are_counted(model):
    shared = engine(model)
    answers(shared, REQUESTS)
    usage = shared.usage
    assert usage.prompt_tokens == sum(len(request.prompt) for request in REQUESTS)
    assert usage.drawn_tokens == sum(request.max_tokens - 1 for request in REQUESTS)
    assert usage.prompt_seconds > 0 and usage.drawn_seconds > 0


def test_the_cache_is_written_in_place(model):
    shared = engine(model)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(shared._held.cache.layers)]
    answers(shared, REQUESTS)
    after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(shared._held.cache.layers)]
    assert before == after


def test_a_second_engine_of_the_same_shapes_compiles_nothing(model, together, caplog):
    with jax.log_compiles():
        answers(engine(model), [Request(prompt=prompt(5, 3), max_tokens=4)])
        names = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert not [name for name in names if "jit(read)" in name or "jit(draw)" in name]


def on_eight_devices():
    model = randomized(CONFIG)
    cases = ((Greedy(), MeshShape(data=2, expert=2, tensor=2)), (Categorical(), MeshShape(fsdp=8)))
    for sampler, shape in cases:
        expected = answers(engine(model, rows=8, sampler=sampler), REQUESTS)
        layout = Layout(shape.build())
        on_mesh = engine(model, rows=8, sampler=sampler, layout=layout)
        keys = on_mesh._held.cache.layers[0].keys
        assert keys.addressable_shards[0].data.size == keys.size // 8
        assert answers(on_mesh, REQUESTS) == expected
        assert on_mesh._held.cache.layers[0].keys.sharding.is_equivalent_to(keys.sharding, keys.ndim)
    with pytest.raises(ValueError, match="the key-value cache has length 3; it must be a multiple of 8"):
        engine(model, rows=3, layout=layout)
    crowded = ExpertParallel(exchange=RaggedAllToAll(room=1.0))
    mixture = dataclasses.replace(EXPERTS, dispatcher=crowded)
    assert mixture.batch_dependence(Layout(cases[0][1].build())) == "the dispatcher ExpertParallel"
    assert mixture.batch_dependence(layout) is None  # which leaves the experts whole


def test_eight_devices_draw_what_one_draws(run_with_devices: Callable[..., str]):
    run_with_devices(8, on_eight_devices)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"router": ExpertChoice()}, "the router ExpertChoice"),
        ({"router": Random()}, "the router Random"),
        ({"dispatcher": CapacityDispatcher()}, "the dispatcher CapacityDispatcher"),
        ({"dispatcher": CapacityDispatcher(order=BatchPriority())}, "the dispatcher CapacityDispatcher"),
        ({"dispatcher": ExpertParallel(exchange=AllToAll())}, "the dispatcher ExpertParallel"),
    ],
)
def test_what_depends_on_the_batch_is_refused_by_name(change, what):
    mixture = dataclasses.replace(EXPERTS, **change)
    config = dataclasses.replace(CONFIG, ffn=FirstLayers(ffn=mixture), allow_look_ahead=True)
    with pytest.raises(ValueError, match=f"Decoder.ffn of layer 1 has {what}, by which .* depends on the other"):
        Engine(config.build(jax.random.key(0)))


def test_a_router_and_a_dispatcher_that_see_one_token_at_a_time_are_accepted():
    for dispatcher in (CapacityDispatcher(routing_group=1), ExpertParallel(exchange=RaggedAllToAll())):
        assert dataclasses.replace(EXPERTS, dispatcher=dispatcher).batch_dependence(None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ()}, "Request.prompt is empty; it needs at least one token"),
        ({"max_tokens": 0}, "Request.max_tokens is 0; it must be at least 1"),
        ({"seed": -1}, "Request.seed is -1; it must be from 0"),
        ({"prompt": (1, 24)}, "Request.prompt holds the token id 24; allowed are 0 to 23"),
        ({"prompt": (-1,)}, "Request.prompt holds the token id -1; allowed are 0 to 23"),
        ({"stop_tokens": (24,)}, "Request.stop_tokens holds the token id 24; allowed are 0 to 23"),
        ({"prompt": (1,) * 49}, "Request.prompt has 49 tokens; the cache holds 48: shorten the prompt, or give more"),
        ({"max_tokens": 48}, "the cache needs 49 slots, and has 48; ask for fewer tokens, or give more slots"),
    ],
)
def test_a_bad_request_is_refused_when_it_is_submitted(model, arguments, message):
    shared = engine(model)
    with pytest.raises(ValueError, match=message):
        shared.submit(Request(**({"prompt": (1, 2), "max_tokens": 1} | arguments)))
    assert list(shared.run()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"chunk": 0}, "chunk is 0; it must be at least 1"),
        ({"chunks_between_steps": 0}, "chunks_between_steps is 0; it must be at least 1, or None"),
        ({"vocab": 25}, "vocab is 25; it must be at least 1 and at most the model's 24"),
    ],
)
def test_a_bad_engine_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine(model, **arguments)
