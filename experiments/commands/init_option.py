"""What `dynamoe train` begins from without a recipe: `--init-from` a published model says which model and tokenizer."""

import dataclasses
import itertools
from collections.abc import Sequence

from ..experiment import Experiment
from ..optimizers import AdamW
from ..published import is_published, published_model
from ..recipes import standard_library

OPTION = "--init-from"
FINE_TUNING_RATE = 1e-5
"""Peak learning rate of a published model that is trained on."""


def default_experiment(arguments: Sequence[str]) -> Experiment:
    """The standard library's recipe; or with `--init-from` a published model that model, trained on its text.

    Raises:
        ValueError: the published model cannot be read, or no tokenizer lies beside it: a recipe names both.
    """
    experiment = standard_library.recipe()
    path = _value(arguments)
    if arguments[:1] != ["train"] or path is None or "--upcycle" in arguments or not is_published(path):
        return experiment
    model, tokenizer = published_model(path)
    optimizer = AdamW(learning_rate=FINE_TUNING_RATE, weight_decay=0.0)
    return dataclasses.replace(experiment, model=model, tokenizer=tokenizer, optimizer=optimizer)


def _value(arguments: Sequence[str]) -> str | None:
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        if name in (OPTION, OPTION.replace("-f", "_f")):
            return value or following
    return None
