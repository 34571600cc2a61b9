"""The dense twin of standard_library.py: equal active FLOPs per token, equal tokens.

Cost: about 2 minutes on a 2-core CPU.
Command: dynamoe train experiments/recipes/standard_library_dense.py
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import standard_library
from dynamoe.models import Dense


def recipe() -> Experiment:
    """A hidden width of two experts' 128, and 4 more for the routers' FLOPs: 0.3% above the mixture's cost."""
    return standard_library.experiment(Dense(hidden=260))
