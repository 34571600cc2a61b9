"""Qwen3-30B-A3B on 8 boxes of 8 H100; model, text and optimizer are those of qwen3_30b_a3b.py.

Cost of a step, by the compiled program: 18.5 of 74.5 GiB a device; an estimate of 9.06 to 11.99 s (docs/scaling.md).
Plan: dynamoe plan experiments/recipes/qwen3_30b_a3b_h100.py --chip h100 --topology 8x8
Command, on every host: dynamoe train experiments/recipes/qwen3_30b_a3b_h100.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import qwen3_30b_a3b
from dynamoe.models import MeshShape
from dynamoe.moe import AllToAll, CapacityDispatcher, ExpertParallel


def recipe() -> Experiment:
    """On H100."""
    # 16 experts a GPU: the exchange stays in a box, at NVLink's speed, and between the boxes travel these 16 alone.
    # Equal batches for all experts: XLA's ragged product on GPUs runs every row through every expert.
    return qwen3_30b_a3b.experiment(
        MeshShape(data=1, fsdp=8, expert=8),
        ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(capacity_factor=1.25))),
        batch_size=1024,
        gradient_accumulation=8,
    )
