"""How sure a model is at an exit: one number a row, 0 to 1, that a threshold is held against.

A row leaves at the first exit whose score is at least the threshold. Rows are scored one by one, so the rows of a call
may stand at different exits. Letters: B rows, D width, V vocabulary or classes.
"""

import abc
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

State = Any
"""What a confidence remembers of a row from exit to exit: a pytree whose arrays begin with the axis B."""


class Confidence(abc.ABC):
    """A measure of confidence. One of your own derives from this: a frozen dataclass, or an `nnx.Module`."""

    def initial(self, rows: int, width: int) -> State:
        """What is known of rows that have met no exit yet; also what a row is set back to when it begins anew."""
        return ()

    @abc.abstractmethod
    def score(
        self, exit_index: Int[Array, " B"], logits: Float[Array, "B V"], hidden: Float[Array, "B D"], state: State
    ) -> tuple[Float[Array, " B"], State]:
        """Scores of rows at an exit, and what to remember of them until their next exit. Runs under `jax.jit`.

        Args:
            exit_index: which exit each row stands at, from 0.
            logits: of this exit.
            hidden: what the exit's head read.
            state: of the row's last exit, or `initial`.

        Returns:
            float32 scores, 0 to 1, higher where the model is surer; the state.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """The confidence and its options in JSON's types. Equal descriptions score equally."""


def split_confidence(confidence: Confidence) -> tuple[Any, Any]:
    """What `jax.jit` may take as a static argument, and what as arrays: an `nnx.Module`'s graph, and its weights."""
    if isinstance(confidence, nnx.Module):
        return nnx.split(confidence)
    return confidence, None


def merge_confidence(static: Any, weights: Any) -> Confidence:
    """What `split_confidence` has split."""
    return static if weights is None else nnx.merge(static, weights)


def _options(confidence: Any) -> dict[str, Any]:
    return {"type": type(confidence).__name__, **asdict(confidence)}


@dataclass(frozen=True, kw_only=True)
class Top2Gap(Confidence):
    """Probability of the best less that of the second best. Schuster et al. 2022 (CALM),
    https://arxiv.org/abs/2207.07061, section 3.5."""

    def score(
        self, exit_index: Int[Array, " B"], logits: Float[Array, "B V"], hidden: Float[Array, "B D"], state: State
    ) -> tuple[Float[Array, " B"], State]:
        # Two maxima: a top-2 sorts, which costs more than the softmax.
        p = jax.nn.softmax(logits.astype(jnp.float32))
        others = jnp.arange(p.shape[1])[None] != jnp.argmax(p, axis=1)[:, None]
        return p.max(axis=1) - jnp.where(others, p, 0.0).max(axis=1), state

    def describe(self) -> dict[str, Any]:
        return _options(self)


@dataclass(frozen=True, kw_only=True)
class NegativeEntropy(Confidence):
    """1 - H / log V: 1 where all probability lies on one answer, 0 where it is spread evenly.

    BranchyNet, Teerapittayanon et al. 2016, https://arxiv.org/abs/1709.01686, and DeeBERT, Xin et al. 2020,
    https://arxiv.org/abs/2004.12993, leave where H is below a threshold in nats; this is the same order, scaled.
    """

    def score(
        self, exit_index: Int[Array, " B"], logits: Float[Array, "B V"], hidden: Float[Array, "B D"], state: State
    ) -> tuple[Float[Array, " B"], State]:
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        # A probability that underflows to 0 counts 0, not 0 * -inf.
        terms = jnp.where(jnp.isneginf(log_probs), 0.0, jnp.exp(log_probs) * log_probs)
        return jnp.clip(1 + terms.sum(axis=1) / jnp.log(jnp.float32(logits.shape[1])), 0.0, 1.0), state

    def describe(self) -> dict[str, Any]:
        return _options(self)


@dataclass(frozen=True, kw_only=True)
class HiddenSimilarity(Confidence):
    """Cosine of the hidden states of a row's last exit and this one: what no longer changes is done. CALM, section 3.5.

    A negative cosine counts 0. The first exit has nothing to compare with and scores 0.
    """

    def initial(self, rows: int, width: int) -> State:
        return jnp.zeros((rows, width), jnp.float32)

    def score(
        self, exit_index: Int[Array, " B"], logits: Float[Array, "B V"], hidden: Float[Array, "B D"], state: State
    ) -> tuple[Float[Array, " B"], State]:
        hidden = hidden.astype(jnp.float32)
        lengths = jnp.linalg.norm(hidden, axis=1) * jnp.linalg.norm(state, axis=1)
        cosine = (hidden * state).sum(axis=1) / jnp.where(lengths > 0, lengths, 1.0)
        return jnp.clip(cosine, 0.0, 1.0), hidden

    def describe(self) -> dict[str, Any]:
        return _options(self)


class _Unchanged(NamedTuple):
    prediction: Int[Array, " B"]
    """Of the row's last exit; -1 before the first."""
    times: Int[Array, " B"]
    """How often in a row it was found again."""


@dataclass(frozen=True, kw_only=True)
class Patience(Confidence):
    """How often in a row an exit repeated the prediction of the exit before it. Zhou et al. 2020 (PABEE),
    https://arxiv.org/abs/2006.04152.

    The score is times / most. `threshold(t)` asks for a patience of t: so a patience is
    calibrated as any other threshold is.
    """

    most: int
    """The longest patience that can be asked for; with N exits at most N - 1 repetitions occur."""

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"Patience.most is {self.most}; it must be at least 1")

    def threshold(self, patience: int) -> float:
        """The threshold that asks for so many repetitions.

        Raises:
            ValueError: it is not between 1 and `most`.
        """
        if not 1 <= patience <= self.most:
            raise ValueError(f"patience is {patience}; it must be 1 to Patience.most = {self.most}")
        # Half a step below, so that rounding cannot decide.
        return (patience - 0.5) / self.most

    def initial(self, rows: int, width: int) -> State:
        return _Unchanged(jnp.full((rows,), -1, jnp.int32), jnp.zeros((rows,), jnp.int32))

    def score(
        self, exit_index: Int[Array, " B"], logits: Float[Array, "B V"], hidden: Float[Array, "B D"], state: State
    ) -> tuple[Float[Array, " B"], State]:
        prediction = jnp.argmax(logits, axis=1).astype(jnp.int32)
        times = jnp.where(prediction == state.prediction, state.times + 1, 0)
        share = jnp.minimum(times.astype(jnp.float32) / self.most, 1.0)
        return share, _Unchanged(prediction, times)

    def describe(self) -> dict[str, Any]:
        return _options(self)
