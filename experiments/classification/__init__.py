"""Training and measuring classifiers with exits, of images and texts."""

from .augmentation import Augmentation, NoChange, RandomShift, WordDropout
from .experiment import ClassificationExperiment

__all__ = ["Augmentation", "ClassificationExperiment", "NoChange", "RandomShift", "WordDropout"]
