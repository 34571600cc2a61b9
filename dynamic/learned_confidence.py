"""A classifier that reads the hidden state at an exit and says whether the last exit would answer the same.

Schuster et al. 2022 (CALM), https://arxiv.org/abs/2207.07061, sections 3.5 and 3.6: independent classifiers of each
exit, trained after the model, whose weights they leave alone. Letters: B rows, D width, N exits, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .confidence import Confidence, State
from .fingerprint import fingerprint


class LearnedClassifier(nnx.Module, Confidence):
    """A linear classifier, or one with a hidden layer, for each exit before the last."""

    def __init__(self, *, width: int, exits: int, neurons: int | None = None, key: jax.Array):
        """
        Args:
            width: D.
            exits: exits that a row may leave at, the last one not counted: there all leave.
            neurons: of a hidden layer with ReLU; None: the classifier is linear, as in the paper.
            key: for the initial weights.
        """
        for name, value in (("width", width), ("exits", exits), ("neurons", 1 if neurons is None else neurons)):
            if value < 1:
                raise ValueError(f"LearnedClassifier: {name} is {value}; it must be at least 1")
        first, second = jax.random.split(key)
        inner = width if neurons is None else neurons
        self.neurons = neurons
        if neurons is not None:
            scale = (2 / width) ** 0.5
            self.inner = nnx.Param(
                scale * jax.random.normal(first, (exits, width, neurons)), axes=(None, "embed", None)
            )
            self.inner_bias = nnx.Param(jnp.zeros((exits, neurons)), axes=(None, None))
        self.kernel = nnx.Param(inner**-0.5 * jax.random.normal(second, (exits, inner)), axes=(None, "embed"))
        self.bias = nnx.Param(jnp.zeros((exits,)), axes=(None,))

    def logit(self, exit_index: Int[Array, " B"], hidden: Float[Array, "B D"]) -> Float[Array, " B"]:
        """Before the sigmoid. An index past the classifiers' reads the last one's."""
        exit_index = jnp.minimum(exit_index, self.bias[...].shape[0] - 1)
        x = hidden.astype(jnp.float32)
        if self.neurons is not None:
            # Every exit's layer on every row, then the row's own: a gather of weights would be larger.
            every = jnp.einsum("BD,NDF->BNF", x, self.inner[...]) + self.inner_bias[...][None]
            x = jax.nn.relu(jnp.take_along_axis(every, exit_index[:, None, None], axis=1)[:, 0])
        return (x * self.kernel[...][exit_index]).sum(axis=1) + self.bias[...][exit_index]

    def score(
        self, exit_index: Int[Array, " B"], logits: Float[Array, "B V"], hidden: Float[Array, "B D"], state: State
    ) -> tuple[Float[Array, " B"], State]:
        return jax.nn.sigmoid(self.logit(exit_index, hidden)), state

    def loss(self, hidden: Float[Array, "N B D"], logits: Float[Array, "N B V"]) -> Float[Array, ""]:
        """Cross-entropy in nats, a mean over exits and rows: does this exit's prediction agree with the last's?

        Args:
            hidden: of all exits, the last one's too; constants to the loss.
            logits: of all exits; constants too.
        """
        hidden, logits = jax.lax.stop_gradient((hidden, logits))
        prediction = jnp.argmax(logits, axis=2)
        agrees = (prediction[:-1] == prediction[-1:]).astype(jnp.float32)
        exits, rows = agrees.shape
        index = jnp.repeat(jnp.arange(exits, dtype=jnp.int32), rows)
        found = self.logit(index, hidden[:-1].reshape(exits * rows, -1)).reshape(exits, rows)
        return (jax.nn.softplus(found) - agrees * found).mean()

    def describe(self) -> dict[str, Any]:
        """Holds a fingerprint of the weights, so that a classifier trained on is another one. Not under `jax.jit`."""
        return {"type": type(self).__name__, "neurons": self.neurons, "weights": fingerprint(nnx.state(self))}
