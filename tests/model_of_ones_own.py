"""A transformer that knows nothing of dynamoe but one line: Flax's own blocks, optimizer and transformations.

Run with the folder of an unpacked wheel as its argument; test_package.py does. Prints losses and the router's load.
"""

import sys

sys.path.insert(0, sys.argv[1])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from dynamoe.moe import MoE, SwiGLU, TopK  # noqa: E402

WIDTH, VOCAB, LENGTH, BATCH = 16, 11, 12, 8


class TransformerBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first_norm, self.second_norm = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.ffn = MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=16)).build(width=WIDTH, key=rngs.params())

    def __call__(self, x):
        x = x + self.attention(self.first_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        y, stats = self.ffn(self.second_norm(x))
        return x + y, stats


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([TransformerBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x, auxiliary = self.embedding(tokens), 0.0
        for block in self.blocks:
            x, stats = block(x)
            auxiliary = auxiliary + stats.loss
        return self.head(x), auxiliary, stats.load


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss_of(model):
        logits, auxiliary, load = model(tokens[:, :-1])
        task = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return task + auxiliary, (task, load)

    gradients, (task, load) = nnx.grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    return task, load


model = Transformer(nnx.Rngs(0))
before = jax.tree.map(jnp.copy, nnx.state(model.blocks[0].ffn, nnx.Param))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
for step in range(30):
    # Each row counts on from a random start.
    start = jax.random.randint(jax.random.key(step), (BATCH, 1), 0, VOCAB)
    task, load = train_step(model, optimizer, (start + jnp.arange(LENGTH + 1)) % VOCAB)
    print(f"{task:.4f}", *(f"{share:.4f}" for share in load))
after = nnx.state(model.blocks[0].ffn, nnx.Param)
moved = jax.tree.map(lambda old, new: float(jnp.abs(new - old).max()), before, after)
print("moved", *(f"{distance:.4f}" for distance in jax.tree.leaves(moved)))
