"""A small mixture of experts on the Python standard library's own sources, byte by byte.

Cost: about 5 minutes on a 2-core CPU. Needs no network and no files: every Python carries the text.
Command: dynamoe train
"""

from ...models import Attention, Decoder
from ...moe import MoE, SwiGLU, TopK
from ..experiment import Experiment
from ..training.optimizers import Muon


def recipe() -> Experiment:
    """8 experts, 2 per token, in every layer."""
    return Experiment(
        model=Decoder(
            vocab=264,
            width=128,
            layers=4,
            attention=Attention(heads=2, qk_norm=True),
            ffn=MoE(experts=8, router=TopK(k=2), expert=SwiGLU(hidden=128)),
        ),
        optimizer=Muon(learning_rate=5e-3),
        steps=1000,
        batch_size=32,
        sequence_length=128,
    )
