"""A text classifier with exits on SST-2: Socher et al. 2013, "Recursive Deep Models for Semantic Compositionality".

Command: DYNAMOE_DATA=path/to/data dynamoe train experiments/recipes/sst2.py
with train.tsv, dev.tsv and test.tsv (columns sentence and label) in path/to/data/sst2. Then
dynamoe evaluate --run-dir runs/sst2 --sweep thresholds
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

import os
from pathlib import Path

from dynamoe.dynamic import Exits, OwnHead
from dynamoe.experiments.classification import ClassificationExperiment, WordDropout
from dynamoe.experiments.data.labelled_text import LabelledFiles, Words
from dynamoe.experiments.optimizers import AdamW
from dynamoe.models import Attention, Dense, TextClassifier


def recipe() -> ClassificationExperiment:
    """Six layers; many sentences are known after one."""
    return experiment(layers=6, exits=Exits(after=(1, 2, 4), head=OwnHead()))


def experiment(layers: int, exits: Exits | None) -> ClassificationExperiment:
    """All but the depth."""
    folder = Path(os.environ.get("DYNAMOE_DATA", "data")) / "sst2"
    return ClassificationExperiment(
        model=TextClassifier(
            vocab=8000,
            length=48,
            width=64,
            layers=layers,
            classes=2,
            attention=Attention(heads=2, qk_norm=True),
            ffn=Dense(hidden=128),
            exits=exits,
            unroll=layers,
        ),
        source=LabelledFiles(
            train=folder / "train.tsv",
            validation=folder / "dev.tsv",
            test=folder / "test.tsv",
            length=48,
            tokens=Words(size=8000),
        ),
        augmentation=WordDropout(share=0.15),
        label_smoothing=0.1,
        optimizer=AdamW(learning_rate=1e-3),
        steps=2400,
        batch_size=128,
        evaluate_every=200,
        checkpoint_every=200,
        log_every=50,
    )
