"""The first weights of a run, out of a published model; and the run's model in the form that it was published in."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from ...models import Decoder, Layout, with_layers
from ...models.checkpoints import Pretrained, as_pretrained, from_pretrained, open_published
from ...models.checkpoints.described import check_described
from ...models.checkpoints.folder import CONFIG, kept_files, read_json, write_json
from ..data import Bytes, Tokenizer
from ..places import Place, is_remote
from ..published import find_tokenizer
from .restore import Trained
from .step import Trainer

PUBLISHED = "published"
"""Folder of a run with the configuration and the tokenizer of the model that it began from."""


def published_weights(path: Place, model: Decoder, trainer: Trainer) -> dict[str, nnx.State]:
    """The `params` and `variables` of step 0, with the shardings of the trainer's state.

    Args:
        path: the published model.
        model: the run's.
        trainer: of the run.

    Raises:
        ValueError: the run's model is not the published one, or its weights are packed, which have no gradient; nothing
            was read.
    """
    check_published(path, model)
    _, _, weights = published_stacked(path, trainer.layout)
    abstract = trainer.abstract_state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, {"params": abstract.params, "variables": abstract.variables})
    return jax.device_put(weights, shardings)


def check_published(path: Place, model: Decoder) -> None:
    """Refuse a model that is not the published one, up to what only training sees."""
    opened = open_published(Path(path))
    if opened.fields.object("quantization_config") is not None:
        raise ValueError(f"init_from {path}: its weights are packed, and have no gradient; give one with plain weights")
    fresh = nnx.eval_shape(lambda: dataclasses.replace(model, exits=None).build(jax.random.key(0), stacked=False))
    try:
        check_described(fresh, opened.family, opened.fields)
        if model.exits is not None:
            raise ValueError(f"model.config.exits is {model.exits}; config describes a model without")
    except ValueError as error:
        raise ValueError(
            f"init_from {path}: the recipe's model is another ({error}); take it from published_model({str(path)!r})"
        ) from error


PROBE = "The quick brown fox, 13 times:\n\tdef f(x): return 'naïve'"
"""Text by which two tokenizers are told apart."""


def check_tokenizer(path: Place, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that is not the published model's: its ids would mean nothing to the weights.

    Raises:
        ValueError: it makes other ids of a text than the one beside the weights; or none lies there, and it is `Bytes`.
    """
    try:
        own = find_tokenizer(open_published(Path(path)).source.files, name=str(path))
    except ValueError as error:
        if type(tokenizer) is not Bytes:
            return
        raise ValueError(f"tokenizer is {tokenizer}, which no published model was trained on ({error})") from error
    if own.bos != tokenizer.bos or own.encode(PROBE).tolist() != tokenizer.encode(PROBE).tolist():
        raise ValueError(
            f"tokenizer is {tokenizer}; the model's own is {own}, and makes other ids: take it from "
            f"published_model({str(path)!r})"
        )


def published_stacked(path: Place, layout: Layout) -> tuple[Decoder, nnx.GraphDef, dict[str, nnx.State]]:
    """Configuration, graph and weights of a published model, its layers stacked."""
    model = from_pretrained(Path(path), layout=layout, stacked=True).model
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    return model.config, graph, {"params": params, "variables": variables}


def keep_origin(path: Place, run: Place) -> None:
    """Copy a published model's configuration and tokenizer into a run, so that the run can be exported."""
    if is_remote(run):
        return
    opened, folder = open_published(Path(path)), Path(run) / PUBLISHED
    folder.mkdir(parents=True, exist_ok=True)
    for file in opened.source.files:
        (folder / file.name).write_bytes(file.read_bytes())
    write_json(folder / CONFIG, opened.source.config)


def published_again(trained: Trained) -> Pretrained:
    """A run's model in the form of the published one that it began from, for `save_pretrained`; in float32.

    Raises:
        ValueError: the run did not begin from a published model.
    """
    folder = None if trained.run is None else Path(trained.run) / PUBLISHED
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"{trained.run} did not begin from a published model, there is no {PUBLISHED} in it; only such a run has a "
            "form that transformers knows"
        )
    pretrained = as_pretrained(with_layers(trained.model, stacked=False), read_json(folder / CONFIG))
    return pretrained._replace(files=kept_files(folder))
