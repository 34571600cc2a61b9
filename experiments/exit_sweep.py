"""What early exit buys and costs at each threshold: depth, FLOPs, time, disagreement, bits per byte.

Letters: n prompts, J thresholds, B batch, S sequence, N exits.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ..dynamic import Constant, EarlyExit, Policy, disagreement, fingerprint
from ..models import DecoderLM, negative_log_likelihood, with_layers
from ..models.accounting import count_parts
from ..models.generation import EarlyExitEngine, Engine, Request, Sampler
from .data import HeldOut, target_mask
from .experiment import Experiment
from .scoring import Pair, score
from .training.restore import model_as_trained

QUARTERS = 4
"""Parts of equal size that prompts are sorted into by how hard the full model finds their text."""


class Point(NamedTuple):
    """One threshold, over all prompts, each alone in its batch."""

    threshold: float | None
    """None: nobody leaves, by the decoder of full depth."""
    layers: float
    """Per drawn token."""
    flops: float
    """Per drawn token, exit heads included."""
    seconds: float
    """Per drawn token."""
    disagreement: float
    """Mean share of an answer's tokens that are not the full model's."""
    bits_per_byte: float
    """Of held-out text, each token at the exit where it leaves; later tokens see what the full model shows them."""
    by_difficulty: tuple[float, ...]
    """Seconds per token of the easiest to the hardest quarter of the prompts."""
    name: str = "full model"
    """Of a point that is no threshold."""


class Sweep(NamedTuple):
    """All thresholds, the full model first, then from the safest on."""

    points: list[Point]
    losses: Float[np.ndarray, "n J"]
    """Disagreement of each prompt at each threshold, for calibration."""
    layers: Float[np.ndarray, "n J"]
    """Mean depth of each prompt."""
    others: list[Point] = []
    """Other models, by their fastest decoder."""


def policy_record(model: DecoderLM, policy: EarlyExit, sampler: Sampler) -> Policy:
    """Under what conditions a policy answers, for a guarantee and its check."""
    return Policy(
        confidence=policy.confidence.describe(),
        exits=model.config.exit_depths,
        thresholds="constant",
        keys_values=str(policy.skipped),
        batch=f"{policy.batch}, {sampler}",
        model=fingerprint(nnx.state(with_layers(model, stacked=False))),
    )


def sweep(
    model: DecoderLM,
    policy: EarlyExit,
    prompts: Sequence[Sequence[int]],
    difficulty: Float[np.ndarray, " n"],
    text: HeldOut,
    *,
    thresholds: Sequence[float],
    tokens: int,
    others: Sequence[tuple[str, DecoderLM]] = (),
) -> Sweep:
    """Answer all prompts greedily, one at a time, at each threshold.

    Args:
        model: unstacked, with exits.
        policy: all of it but its thresholds.
        prompts: n of them.
        difficulty: of each prompt, such as the full model's nats per token on its text.
        text: that bits per byte are measured on.
        thresholds: descending: the safest first.
        tokens: of each answer.
        others: models to compare with, by name: shallower ones of the same tokenizer.
    """
    longest = max(map(len, prompts)) + tokens
    quarters = np.array_split(np.argsort(difficulty, kind="stable"), QUARTERS)
    full, full_seconds, _ = _answers(Engine(model, rows=1, slots=longest), prompts, tokens)
    costs, bits = exit_flops(model, longest), exit_bits(model, policy, text, [None, *thresholds])

    def plain(name: str, of: DecoderLM, answers: np.ndarray, seconds: np.ndarray, bits: float) -> Point:
        flops = count_parts(dataclasses.replace(of.config, exits=None), longest)[-1].flops
        apart = float(disagreement(answers, full).mean())
        by_difficulty = _means(seconds, quarters)
        return Point(None, float(of.config.layers), flops, seconds.mean(), apart, bits, by_difficulty, name)

    points, beside = [plain("full model", model, full, full_seconds, bits[0])], []
    for name, other in others:
        answers, seconds, _ = _answers(Engine(other, rows=1, slots=longest), prompts, tokens)
        beside.append(plain(name, other, answers, seconds, last_bits(other, text)))
    losses, layers = [], []
    for threshold, value in zip(thresholds, bits[1:], strict=True):
        chosen = dataclasses.replace(policy, thresholds=Constant(threshold=threshold))
        engine = EarlyExitEngine(model, chosen, rows=1, slots=longest)
        found, seconds, counts = _answers(engine, prompts, tokens)
        loss = disagreement(found, full)
        shares = counts.sum(axis=0) / counts.sum()
        mean = counts @ np.array(model.config.exit_depths) / counts.sum(axis=1)
        losses.append(loss)
        layers.append(mean)
        points.append(
            Point(
                threshold,
                float(mean.mean()),
                float(shares @ costs),
                seconds.mean(),
                float(loss.mean()),
                value,
                _means(seconds, quarters),
            )
        )
    return Sweep(points, np.stack(losses, axis=1), np.stack(layers, axis=1), beside)


def prompt_nats(
    model: DecoderLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Float[np.ndarray, " n"]:
    """The full model's nats per token on the text that follows each prompt: how hard it is."""
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    scores = score(model, list(map(Pair, prompts, answers)), longest=longest)
    return np.array([-one.log_likelihood / len(answer) for one, answer in zip(scores, answers, strict=True)])


def exit_flops(model: DecoderLM, length: int) -> Float[np.ndarray, " N"]:
    """Active FLOPs of a token that leaves at each exit, with the heads that it met on the way."""
    config = model.config
    whole = count_parts(dataclasses.replace(config, exits=None), length)
    head = next(part.flops for part in whole if part.name == "head")
    layers = (whole[-1].flops - head) / config.layers
    return np.array([depth * layers + (exit + 1) * head for exit, depth in enumerate(config.exit_depths)])


def exit_bits(model: DecoderLM, policy: EarlyExit, text: HeldOut, thresholds: Sequence[float | None]) -> list[float]:
    """Bits per byte where each token is predicted at the first exit that is sure enough; None: by the full model."""
    graph, state = nnx.split(model)

    @jax.jit
    def nats(state: nnx.State, windows) -> tuple[jax.Array, jax.Array]:
        """Nats of every target at each exit [N, B, S], and how sure the exits before the last are [N-1, B, S]."""
        lm = nnx.merge(graph, state)
        hidden = lm.hidden(*windows.inputs)
        targets = windows.tokens[:, 1:]
        losses = [
            negative_log_likelihood(lm, x, targets, exit=exit) for exit, x in enumerate((*hidden.exits, hidden.x))
        ]
        rows, scores = targets.size, []
        memory = policy.confidence.initial(rows, lm.config.width)
        for exit, x in enumerate(hidden.exits):
            flat = x.reshape(rows, -1)
            logits = lm.head(x, exit).reshape(rows, -1)
            score, memory = policy.confidence.score(jnp.full(rows, exit, jnp.int32), logits, flat, memory)
            scores.append(score.reshape(targets.shape))
        return jnp.stack(losses), jnp.stack(scores)

    totals = np.zeros(len(thresholds))
    for batch in text.batches:
        losses, scores = (np.asarray(array, np.float64) for array in nats(state, batch))
        mask = target_mask(batch)
        for place, threshold in enumerate(thresholds):
            sure = np.zeros(scores.shape, bool) if threshold is None else scores >= threshold
            exit = np.where(sure.any(axis=0), sure.argmax(axis=0), len(losses) - 1)
            totals[place] += np.take_along_axis(losses, exit[None], axis=0)[0][mask].sum()
    return (totals / np.log(2) / text.bytes).tolist()


def last_bits(model: DecoderLM, text: HeldOut) -> float:
    """Bits per byte of the last exit."""
    trained = model_as_trained(Experiment(model=model.config), model, 0)
    return trained.bits_per_byte(text)


def _answers(
    engine: Engine | EarlyExitEngine, prompts: Sequence[Sequence[int]], tokens: int
) -> tuple[Int[np.ndarray, "n S"], Float[np.ndarray, " n"], Int[np.ndarray, "n N"]]:
    """Tokens after each prompt, seconds of each of them, and the exits they left at: of a second time, for in the first
    one all shapes are compiled."""
    answers, seconds, counts = [], [], []
    for prompt in [*prompts, *prompts]:
        before = engine.depths.tokens if isinstance(engine, EarlyExitEngine) else ()
        engine.submit(Request(prompt=tuple(prompt), max_tokens=tokens + 1))
        spent = engine.usage.drawn_seconds
        answers.append([drawn.token for drawn in engine.run()])
        seconds.append((engine.usage.drawn_seconds - spent) / tokens)
        after = engine.depths.tokens if isinstance(engine, EarlyExitEngine) else ()
        counts.append([b - a for a, b in zip(before, after, strict=True)])
    second = slice(len(prompts), None)
    return np.array(answers[second]), np.array(seconds[second]), np.array(counts[second], int)


def _means(values: Float[np.ndarray, " n"], groups: Sequence[np.ndarray]) -> tuple[float, ...]:
    return tuple(float(values[group].mean()) for group in groups)
