"""Mixtral 8x7B on 64 chips of v6e (8x8); model, text and optimizer are those of mixtral_8x7b.py.

Cost of a step, by the compiled program: 27.6 of 32.0 GiB a device; an estimate of 3.48 to 6.05 s (docs/scaling.md).
Plan: dynamoe plan experiments/recipes/mixtral_8x7b_v6e.py --chip v6e --topology 8x8
Command, on every host: dynamoe train experiments/recipes/mixtral_8x7b_v6e.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import mixtral_8x7b
from dynamoe.models import MeshShape
from dynamoe.moe import AllToAll, CapacityDispatcher, ExpertParallel


def recipe() -> Experiment:
    """On v6e."""
    # One expert a chip, along one side of the slice: 8 experts do not divide over a side of 16, so no 16x16. Equal
    # batches for all experts, because XLA's ragged product on v6e is not known to skip what it need not do. Two
    # micro-batches keep a chip's activations at 2 sequences.
    return mixtral_8x7b.experiment(
        MeshShape(data=1, fsdp=8, expert=8),
        ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(capacity_factor=1.25))),
        batch_size=256,
        gradient_accumulation=4,
    )
