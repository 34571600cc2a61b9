"""Generation: greedy against a loop over full forward passes, and what its options promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import Attention, Decoder, FirstLayers
from dynamoe.models.ffn import Dense
from dynamoe.models.generate import Sampling, generate
from dynamoe.moe import MoE, SwiGLU, TopK

V, TOKENS = 24, 8
CONFIG = Decoder(
    vocab=V,
    width=16,
    layers=3,
    attention=Attention(heads=2),
    ffn=FirstLayers(ffn=MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8)), first=Dense(hidden=24)),
)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]]
GREEDY, WARM = Sampling(temperature=0.0), Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def model():
    model = nnx.eval_shape(lambda: CONFIG.build(jax.random.key(0)))
    noise = np.random.default_rng(1)
    # Large weights, so that what comes next depends on all that came before.
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(jnp.asarray(noise.normal(size=variable.get_value().shape), jnp.float32))
    return model


def draw(model, prompts=PROMPTS, *, sampling=GREEDY, seed=0, tokens=TOKENS, stop=None, vocab=None):
    key = jax.random.key(seed)
    steps = generate(model, prompts, tokens=tokens, sampling=sampling, key=key, stop=stop, vocab=vocab)
    return np.stack(list(steps), axis=1)


@pytest.fixture(scope="module")
def greedy(model):
    return draw(model)


@pytest.mark.smoke
def test_greedy_equals_a_loop_over_full_forward_passes(model, greedy):
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens).logits)
    for row, prompt in enumerate(PROMPTS):
        sequence = list(prompt)
        for _ in range(TOKENS):
            # Padded to one length: what comes later does not matter to a causal model.
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(sequence)] = sequence
            sequence.append(int(forward(state, padded)[0, len(sequence) - 1].argmax()))
        np.testing.assert_array_equal(greedy[row], sequence[len(prompt) :])
    assert len(set(greedy.ravel())) > 3  # else this test would see little


def test_a_row_continues_the_same_beside_any_other(model, greedy):
    np.testing.assert_array_equal(draw(model, PROMPTS[::-1])[::-1], greedy)


def test_the_seed_alone_decides_what_is_drawn(model):
    first, again, other = (draw(model, sampling=WARM, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_step_and_row_draws_anew(model):
    indifferent = nnx.clone(model)
    indifferent.head_kernel[...] = jnp.zeros_like(indifferent.head_kernel[...])
    drawn = draw(indifferent, sampling=WARM)
    assert all(len(set(row[1:])) > 1 for row in drawn) and (drawn[0] != drawn[1]).any()


def test_after_its_stop_a_row_yields_stop_and_all_stopped_ends(model, greedy):
    stop = int(greedy[0, 2])
    rows = draw(model, stop=stop)
    lengths = []
    for row, free in zip(rows, greedy, strict=True):
        ended = np.flatnonzero(free == stop)
        end = ended[0] if len(ended) else TOKENS
        lengths.append(end + 1)
        np.testing.assert_array_equal(row[: end + 1], free[: end + 1][: len(row)])
        assert (row[end:] == stop).all()
    assert rows.shape[1] == min(max(lengths), TOKENS)
    alone = draw(model, PROMPTS[:1], stop=stop)[0]
    assert alone[-1] == stop and len(alone) == 1 + list(greedy[0]).index(stop)


def test_ids_past_the_tokenizers_vocabulary_are_never_drawn(model):
    assert draw(model, sampling=WARM, seed=3).max() >= 5
    assert draw(model, sampling=WARM, seed=3, vocab=5).max() < 5


def test_the_one_most_likely_token_is_greedy(model, greedy):
    np.testing.assert_array_equal(draw(model, sampling=Sampling(temperature=5.0, top_k=1)), greedy)


def test_a_second_call_compiles_nothing(model, greedy, caplog):
    with jax.log_compiles():
        draw(model, [[1], [2, 3]], seed=9)  # another prompt of the same rounded length
        names = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert not [name for name in names if "prefill" in name or "step" in name]


def test_sampling_draws_from_the_softmax_of_scaled_logits():
    logits = jnp.array([2.0, 1.0, 0.0, -1.0])
    rows = jnp.broadcast_to(logits, (4_000, 4))
    for temperature in (0.5, 2.0):
        drawn = np.asarray(jax.jit(Sampling(temperature=temperature).draw)(rows, jax.random.key(4)))
        expected = np.exp(np.asarray(logits, np.float64) / temperature)
        # The standard error of a share is at most 0.008.
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4_000, expected / expected.sum(), atol=0.03)


def test_top_k_draws_the_k_most_likely_in_their_proportions():
    logits = jnp.array([0.0, 2.0, 1.0, -1.0])
    drawn = np.asarray(
        jax.jit(Sampling(temperature=1.0, top_k=2).draw)(jnp.broadcast_to(logits, (4_000, 4)), jax.random.key(4))
    )
    # e^2 / (e^2 + e) = 0.7310586.
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4_000, [0, 0.7310586, 0.2689414, 0], atol=0.03)
    many = Sampling(temperature=1.0, top_k=99).draw(logits[None], jax.random.key(0))
    assert 0 <= int(many[0]) < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"prompts": []}, "prompts is .*; there must be at least one"),
        ({"prompts": [[1], []]}, "each needs at least one token"),
        ({"prompts": [[1, 24]]}, "prompts hold the token id 24; allowed are 0 to 23"),
        ({"prompts": [[-1]]}, "prompts hold the token id -1; allowed are 0 to 23"),
        ({"vocab": 0}, "vocab is 0; it must be at least 1 and at most the model's 24"),
        ({"vocab": 25}, "vocab is 25; it must be at least 1 and at most the model's 24"),
        ({"stop": 24}, "stop is 24; allowed are 0 to 23, or None"),
    ],
)
def test_bad_input_is_refused_at_the_call(model, arguments, message):
    good = {"prompts": PROMPTS, "tokens": 1, "sampling": GREEDY, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=message):
        generate(model, **(good | arguments))  # not iterated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1; it must be finite and at least 0"),
        ({"temperature": float("inf")}, "temperature is inf; it must be finite"),
        ({"temperature": float("nan")}, "temperature is nan; it must be finite"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1, or none"),
    ],
)
def test_bad_sampling_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)
