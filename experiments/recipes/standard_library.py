"""A small mixture of experts on the Python standard library's own sources, byte by byte.

Cost: about 3 minutes on a 2-core CPU. Needs no network and no files: every Python carries the text.
Command: dynamoe train, or dynamoe train experiments/recipes/standard_library.py
Its dense twin, of equal active FLOPs per token, is standard_library_dense.py; `dynamoe demo` compares the two.
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import Muon
from dynamoe.models import Attention, Decoder
from dynamoe.moe import FeedForward, MoE, SwiGLU, TopK


def recipe() -> Experiment:
    """In every one of 3 layers: the best of 8 experts for each token, and a shared one that all tokens pass."""
    return experiment(
        MoE(
            experts=8,
            router=TopK(k=1, renormalize=False),
            expert=SwiGLU(hidden=128),
            shared=SwiGLU(hidden=128),
        )
    )


def experiment(ffn: FeedForward) -> Experiment:
    """All but the feed-forward networks."""
    return Experiment(
        model=Decoder(vocab=264, width=96, layers=3, attention=Attention(heads=2, qk_norm=True), ffn=ffn, unroll=3),
        optimizer=Muon(learning_rate=2e-2),
        steps=300,
        batch_size=32,
        sequence_length=128,
        evaluate_every=100,
        checkpoint_every=100,
    )
