"""A vision transformer with exits on scikit-learn's digits, which need no network.

Cost: under a minute on a 2-core CPU.
Command: dynamoe train experiments/recipes/digits.py
Then dynamoe evaluate --run-dir runs/digits --sweep thresholds
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.dynamic import Exits, OwnHead
from dynamoe.experiments.classification import ClassificationExperiment, RandomShift
from dynamoe.experiments.optimizers import Muon
from dynamoe.models import Attention, Dense, VisionTransformer


def recipe() -> ClassificationExperiment:
    """Six layers, with an answer after each second one."""
    return ClassificationExperiment(
        model=VisionTransformer(
            image=(8, 8, 1),
            patch=2,
            width=64,
            layers=6,
            attention=Attention(heads=4, qk_norm=True),
            ffn=Dense(hidden=128),
            exits=Exits(after=(2, 4), head=OwnHead()),
            unroll=2,
        ),
        augmentation=RandomShift(most=1),
        optimizer=Muon(learning_rate=1e-2),
        steps=600,
        batch_size=64,
        evaluate_every=200,
        checkpoint_every=200,
    )
