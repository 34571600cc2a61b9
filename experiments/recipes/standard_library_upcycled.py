"""The dense twin of standard_library.py, upcycled: its networks cut into halves, four copies of each as experts.

A token takes two of the eight experts, one copy's two halves at first: the cost per token is the dense model's, and so
is the function before the first step. The run of the dense model has to be there.

Cost: about 2 minutes on a 2-core CPU, after 2 for the dense run.
Command: dynamoe train experiments/recipes/standard_library_dense.py --run-dir runs/dense
         dynamoe train experiments/recipes/standard_library_upcycled.py --init-from runs/dense \\
             --upcycle granular-split --upcycle.shards 2
With `RouterFirst(optimizer=Muon(...), steps=20)` of experiments/router_first.py as its optimizer, the routers would
learn alone for 20 steps.
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

import dataclasses

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import standard_library
from dynamoe.moe import MoE, SwiGLU, TopK


def recipe() -> Experiment:
    """Half as many steps as the dense run had; 8 experts of half its hidden width 260."""
    mixture = MoE(experts=8, router=TopK(k=2), expert=SwiGLU(hidden=130))
    return dataclasses.replace(standard_library.experiment(mixture), steps=150)
