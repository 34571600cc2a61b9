"""Eight dense layers with exits after two, four and six, on the standard library's text.

Cost: about 10 minutes on a 2-core CPU.
Command: dynamoe train experiments/recipes/standard_library_exits.py
Then dynamoe generate --self-speculate 3, or --early-exit 0.8.
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.dynamic import Exits
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import Muon
from dynamoe.models import Attention, Decoder, Dense


def recipe() -> Experiment:
    """All exits learn at once, each counted by its depth."""
    return experiment(layers=8, exits=Exits(after=(2, 4, 6)))


def experiment(layers: int, exits: Exits | None) -> Experiment:
    """All but the depth."""
    return Experiment(
        model=Decoder(
            vocab=264,
            width=256,
            layers=layers,
            attention=Attention(heads=4, kv_heads=2, qk_norm=True),
            ffn=Dense(hidden=768),
            exits=exits,
            unroll=2,
        ),
        optimizer=Muon(learning_rate=2e-2),
        steps=300,
        batch_size=32,
        sequence_length=128,
        evaluate_every=100,
        checkpoint_every=100,
    )
