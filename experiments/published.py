"""A published model for the commands: its weights, its tokenizer, the tokens that end an answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..models import Decoder
from ..models.checkpoints import Pretrained, from_pretrained, open_published
from ..models.checkpoints.folder import CONFIG
from ..models.checkpoints.llama2_c import is_llama2_c
from .data import HuggingFaceTokenizer, SentencePiece, Tokenizer, check_vocabulary
from .files import read_json
from .places import Place

TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"


class Published(NamedTuple):
    """A published model with what text needs."""

    pretrained: Pretrained
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    """Ids that end an answer."""
    longest: int | None
    """Tokens that it was trained to see at once, as its configuration says."""


def is_published(path: str | Place) -> bool:
    """Whether a path leads to a published model: a folder whose config.json names a family, or a file of llama2.c."""
    if "://" in str(path):  # a run in a store
        return False
    place = Path(path)
    if is_llama2_c(place):
        return True
    try:
        config = json.loads((place / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def load_published(
    path: str | Path,
    *,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Published:
    """Load a published model, unstacked, on the default device.

    Args:
        path: as of `from_pretrained`.
        tokenizer: a tokenizer.json or a SentencePiece model. None: the one that lies beside the weights.
        dtype: of parameters and of computing with them.

    Raises:
        ValueError: as `from_pretrained`; or there is no tokenizer, or it has more ids than the model.
    """
    pretrained = from_pretrained(path, dtype=dtype)
    found = find_tokenizer(pretrained.files, name=str(path)) if tokenizer is None else open_tokenizer(tokenizer)
    check_vocabulary(found, pretrained.model.config.vocab)
    longest = pretrained.config.get("max_position_embeddings")
    return Published(pretrained, found, stop_tokens(pretrained, found), longest if isinstance(longest, int) else None)


def published_model(path: str | Path, *, tokenizer: Path | None = None) -> tuple[Decoder, Tokenizer]:
    """A published model's configuration and tokenizer, for a recipe that trains it on; no weight is read.

        def recipe():
            model, tokenizer = published_model("path/to/OLMoE-1B-7B-0924")
            model = dataclasses.replace(model, dtype="bfloat16", remat=True)
            return Experiment(model=model, tokenizer=tokenizer, source=PromptCompletion(train=("mine.jsonl",)))

    `dynamoe train recipe.py --init-from path/to/OLMoE-1B-7B-0924` then begins with its weights. Arguments and errors as
    of `load_published`.
    """
    opened = open_published(path)
    found = find_tokenizer(opened.source.files, name=str(path)) if tokenizer is None else open_tokenizer(tokenizer)
    check_vocabulary(found, opened.decoder.vocab)
    return opened.decoder, found


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer of a file, by what it ends in.

    Raises:
        ValueError: it ends in neither .json nor .model, or cannot be read as such.
    """
    if path.suffix not in (".json", ".model"):
        raise ValueError(f"tokenizer is {path}; it must end in .json (Hugging Face) or in .model (SentencePiece)")
    found = HuggingFaceTokenizer(path=str(path)) if path.suffix == ".json" else SentencePiece(path=str(path))
    assert found.vocab_size  # reads the file: what is wrong with it shows now
    return found


def find_tokenizer(files: Sequence[Path], *, name: str) -> Tokenizer:
    """The tokenizer among the files of a published model, with the marks that the model was trained on: what begins a
    document is what tokenizer.json puts there, not every token that looks like it.

    Args:
        files: those that lie beside the weights.
        name: of the model, for the error.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    by_name = {file.name: file for file in files}
    if TOKENIZER_JSON in by_name:
        path = by_name[TOKENIZER_JSON]
        first = HuggingFaceTokenizer(path=str(path)).first_special()
        end = _named_token(by_name, "eos_token")
        return HuggingFaceTokenizer(path=str(path), bos_token=first or "", eos_token=end)
    if SENTENCEPIECE in by_name:
        return open_tokenizer(by_name[SENTENCEPIECE])
    raise ValueError(
        f"model {name}: neither {TOKENIZER_JSON} nor {SENTENCEPIECE} lies beside its weights; give the tokenizer's file"
    )


def stop_tokens(pretrained: Pretrained, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer: the ids of generation_config.json, else of config.json, and the tokenizer's own mark."""
    generation = next((read_json(file) for file in pretrained.files if file.name == GENERATION), {})
    ids: set[int] = set() if tokenizer.eos is None else {tokenizer.eos}
    for settings in (generation, pretrained.config):
        named = settings.get("eos_token_id") if isinstance(settings, dict) else None
        found = [id for id in (named if isinstance(named, list) else [named]) if isinstance(id, int)]
        if found:
            ids.update(id for id in found if 0 <= id < pretrained.model.config.vocab)
            break
    return tuple(sorted(ids))


def _named_token(files: dict[str, Path], name: str) -> str | None:
    """A token's text in tokenizer_config.json, where it stands as a text or as an object."""
    settings: Any = read_json(files[SETTINGS]) if SETTINGS in files else {}
    token = settings.get(name) if isinstance(settings, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
