"""OLMoE-1B-7B on 4 boxes of 8 H100; model, text and optimizer are those of olmoe_1b_7b.py.

Cost of a step, by the compiled program: 14.3 of 74.5 GiB a device; an estimate of 2.89 to 4.70 s (docs/scaling.md).
Plan: dynamoe plan experiments/recipes/olmoe_1b_7b_h100.py --chip h100 --topology 4x8
Command, on every host: dynamoe train experiments/recipes/olmoe_1b_7b_h100.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import olmoe_1b_7b
from dynamoe.models import MeshShape
from dynamoe.moe import AllToAll, CapacityDispatcher, ExpertParallel


def recipe() -> Experiment:
    """On H100."""
    # 8 experts a GPU: the exchange stays in a box, at NVLink's speed, and between the boxes travel these 8 alone. Equal
    # batches for all experts: XLA's ragged product on GPUs runs every row through every expert.
    return olmoe_1b_7b.experiment(
        MeshShape(data=1, fsdp=4, expert=8),
        ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(capacity_factor=1.25))),
        batch_size=1024,
        gradient_accumulation=8,
    )
