"""A small mixture of experts on the Python standard library's own sources, byte by byte.

Cost: about 4 minutes on a 2-core CPU. Needs no network and no files: every Python carries the text.
Command: dynamoe train
"""

from ...models import Attention, Decoder
from ...moe import MoE, SwiGLU, TopK
from ..experiment import Experiment
from ..optimizers import Muon


def recipe() -> Experiment:
    """4 experts, 2 per token, in every one of 4 layers."""
    return Experiment(
        model=Decoder(
            vocab=264,
            width=96,
            layers=4,
            attention=Attention(heads=2, qk_norm=True),
            ffn=MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=96)),
            unroll=4,
        ),
        optimizer=Muon(learning_rate=2e-2),
        steps=400,
        batch_size=32,
        sequence_length=128,
        evaluate_every=100,
        checkpoint_every=100,
    )
