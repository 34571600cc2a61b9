"""What a recipe of a classifier builds: a model, its examples, an optimizer and the sizes of a training run."""

from dataclasses import dataclass

from ...models import Classifier, TextClassifier, VisionTransformer
from ..data.examples import LabelledSource
from ..data.images import Digits
from ..experiment import TrainingRun
from .augmentation import Augmentation, NoChange


@dataclass(frozen=True, kw_only=True)
class ClassificationExperiment(TrainingRun):
    """One training run of a classifier, whole: the same experiment and versions give the same numbers."""

    model: Classifier = VisionTransformer(image=(8, 8, 1), patch=2)
    """The classifier."""
    source: LabelledSource = Digits()
    """The examples."""
    augmentation: Augmentation = NoChange()
    """How inputs are changed in training."""
    label_smoothing: float = 0.0
    """Share of a label's probability that is spread over all classes: Szegedy et al. 2015,
    https://arxiv.org/abs/1512.00567."""
    steps: int = 500
    """Optimizer steps of the whole run."""
    batch_size: int = 64
    """Examples per step, over all devices and micro-batches."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")


def check_fits(experiment: ClassificationExperiment) -> None:
    """Refuse a model that does not fit its examples, before anything is computed or written.

    Raises:
        ValueError: the inputs have another shape than the model takes, or there are other classes.
    """
    model, names = experiment.model, experiment.source.class_names()
    if len(names) != model.classes:
        raise ValueError(f"model.classes is {model.classes}; the source has {len(names)} classes: {names[:5]}")
    found, wanted = experiment.source.examples("train").inputs, model.example(1)
    if found.shape[1:] != wanted.shape[1:]:
        raise ValueError(
            f"the model takes inputs of {wanted.shape[1:]}, and the source has {found.shape[1:]}; "
            f"{type(model).__name__} and {type(experiment.source).__name__} must agree"
        )
    if isinstance(model, TextClassifier) and found.max() >= model.vocab:
        raise ValueError(f"model.vocab is {model.vocab}; the source has the token id {found.max()}")
