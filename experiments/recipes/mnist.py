"""A vision transformer with exits on MNIST.

Command: DYNAMOE_DATA=path/to/data dynamoe train experiments/recipes/mnist.py
with MNIST's four idx files in path/to/data/mnist. Then dynamoe evaluate --run-dir runs/mnist --sweep thresholds
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

import os
from pathlib import Path

from dynamoe.dynamic import Exits, OwnHead
from dynamoe.experiments.classification import ClassificationExperiment, RandomShift
from dynamoe.experiments.data.images import MnistFiles
from dynamoe.experiments.optimizers import Muon
from dynamoe.models import Attention, Dense, VisionTransformer


def recipe() -> ClassificationExperiment:
    """Eight layers; most digits are known after one or two."""
    return experiment(layers=8, exits=Exits(after=(1, 2, 4), head=OwnHead()))


def experiment(layers: int, exits: Exits | None) -> ClassificationExperiment:
    """All but the depth."""
    return ClassificationExperiment(
        model=VisionTransformer(
            image=(28, 28, 1),
            patch=8,
            stride=5,
            width=96,
            layers=layers,
            attention=Attention(heads=3, qk_norm=True),
            ffn=Dense(hidden=192),
            exits=exits,
            unroll=layers,
        ),
        source=MnistFiles(folder=Path(os.environ.get("DYNAMOE_DATA", "data")) / "mnist"),
        augmentation=RandomShift(most=2),
        optimizer=Muon(learning_rate=1e-2),
        steps=4300,
        batch_size=128,
        evaluate_every=430,
        checkpoint_every=430,
        log_every=43,
    )
