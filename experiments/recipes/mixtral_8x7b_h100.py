"""Mixtral 8x7B on 8 boxes of 8 H100; model, text and optimizer are those of mixtral_8x7b.py.

Cost of a step, by the compiled program: 24.8 of 74.5 GiB a device; an estimate of 2.00 to 4.28 s (docs/scaling.md).
Plan: dynamoe plan experiments/recipes/mixtral_8x7b_h100.py --chip h100 --topology 8x8
Command, on every host: dynamoe train experiments/recipes/mixtral_8x7b_h100.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import mixtral_8x7b
from dynamoe.models import MeshShape
from dynamoe.moe import AllToAll, CapacityDispatcher, ExpertParallel


def recipe() -> Experiment:
    """On H100."""
    # One expert a GPU, so the exchange stays in a box, at NVLink's speed; between the boxes travel the weights of
    # that expert alone. Equal batches for all experts: XLA's ragged product on GPUs runs each row through every expert.
    return mixtral_8x7b.experiment(
        MeshShape(data=1, fsdp=8, expert=8),
        ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(capacity_factor=1.25))),
        batch_size=256,
        gradient_accumulation=2,
    )
