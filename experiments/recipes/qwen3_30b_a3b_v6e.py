"""Qwen3-30B-A3B on 256 chips of v6e (16x16); model, text and optimizer are those of qwen3_30b_a3b.py.

Cost of a step of 4.19 million tokens, from the compiled program: 13.3 of 32.0 GiB of a chip; an estimate of 0.69 s at
least, 1.53 s where nothing overlaps.
Plan: dynamoe plan experiments/recipes/qwen3_30b_a3b_v6e.py --chip v6e --topology 16x16
Command, on every host: dynamoe train experiments/recipes/qwen3_30b_a3b_v6e.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import qwen3_30b_a3b
from dynamoe.models import MeshShape
from dynamoe.moe import DroplessDispatcher


def recipe() -> Experiment:
    """On v6e."""
    # As on v5p the experts travel and tokens stay. Both sides of 16 are rings, which sides of 8 are not.
    return qwen3_30b_a3b.experiment(
        MeshShape(data=1, fsdp=256),
        DroplessDispatcher(),
        batch_size=1024,
        gradient_accumulation=1,
    )
