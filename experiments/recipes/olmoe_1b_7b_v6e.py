"""OLMoE-1B-7B on 64 chips of v6e (8x8); model, text and optimizer are those of olmoe_1b_7b.py.

Cost of a step, by the compiled program: 9.3 of 32.0 GiB a device; an estimate of 1.25 to 2.24 s (docs/scaling.md).
Plan: dynamoe plan experiments/recipes/olmoe_1b_7b_v6e.py --chip v6e --topology 8x8
Command, on every host: dynamoe train experiments/recipes/olmoe_1b_7b_v6e.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import olmoe_1b_7b
from dynamoe.models import MeshShape
from dynamoe.moe import DroplessDispatcher


def recipe() -> Experiment:
    """On v6e."""
    # As on v5p the experts travel and tokens stay. Micro-batches of 4 sequences a chip.
    return olmoe_1b_7b.experiment(
        MeshShape(data=1, fsdp=64),
        DroplessDispatcher(),
        batch_size=1024,
        gradient_accumulation=4,
    )
