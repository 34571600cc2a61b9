"""Tokenizers: text to ids and back."""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from .extras import require

# Names under which published tokenizers keep the marks of a document's beginning and end, the likeliest first.
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "[EOS]", "<|endoftext|>")


class Tokenizer(abc.ABC):
    """Text to ids in [0, vocab_size) and back.

    A tokenizer of your own derives from this class: a frozen dataclass whose fields are its settings.
    """

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    @abc.abstractmethod
    def bos(self) -> int | None:
        """Id that begins a document, or None."""

    @property
    @abc.abstractmethod
    def eos(self) -> int | None:
        """Id that ends a document, or None."""

    @abc.abstractmethod
    def encode(self, text: str) -> Int[np.ndarray, "S"]:
        """Ids (int32) of the text alone, without bos and eos."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int] | Int[np.ndarray, "S"]) -> str:
        """Text of ids; bos and eos give no text."""

    def encode_many(self, texts: Sequence[str]) -> list[Int[np.ndarray, "S"]]:
        """`encode` of each text. A tokenizer that has something faster overrides it."""
        return [self.encode(text) for text in texts]

    def encode_document(self, text: str) -> Int[np.ndarray, "S"]:
        """Ids (int32) of a whole document: bos where there is one, the text, eos where there is one."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[Int[np.ndarray, "S"]]:
        """`encode_document` of each text."""
        before = [] if self.bos is None else [self.bos]
        after = [] if self.eos is None else [self.eos]
        return [np.concatenate([before, ids, after]).astype(np.int32) for ids in self.encode_many(texts)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes(Tokenizer):
    """UTF-8 bytes are the ids 0 to 255; 256 begins a document and 257 ends it."""

    @property
    def vocab_size(self) -> int:
        return 258

    @property
    def bos(self) -> int:
        return 256

    @property
    def eos(self) -> int:
        return 257

    def encode(self, text: str) -> Int[np.ndarray, "S"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | Int[np.ndarray, "S"]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Its truncation and padding settings are switched off: they would cut documents.

    Args:
        path: the file.
        bos_token: token that begins a document; None: the first of `BOS_NAMES` that it knows, if any; "": none.
        eos_token: token that ends a document; None: the first of `EOS_NAMES` that it knows, if any; "": none.
    """

    path: str
    bos_token: str | None = None
    eos_token: str | None = None

    @functools.cached_property
    def _loaded(self) -> Any:
        import tokenizers

        _check_file("HuggingFaceTokenizer", self.path)
        try:
            loaded = tokenizers.Tokenizer.from_file(self.path)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"HuggingFaceTokenizer(path={self.path!r}): not a tokenizer.json: {error}") from error
        loaded.no_truncation()
        loaded.no_padding()
        return loaded

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._loaded.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps

    @functools.cached_property
    def bos(self) -> int | None:
        return self._special("bos_token", self.bos_token, BOS_NAMES)

    @functools.cached_property
    def eos(self) -> int | None:
        return self._special("eos_token", self.eos_token, EOS_NAMES)

    def encode(self, text: str) -> Int[np.ndarray, "S"]:
        return np.array(self._loaded.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[Int[np.ndarray, "S"]]:
        encodings = self._loaded.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int] | Int[np.ndarray, "S"]) -> str:
        marks = {self.bos, self.eos}
        return self._loaded.decode([i for i in map(int, ids) if i not in marks], skip_special_tokens=False)

    def first_special(self) -> str | None:
        """The token that the file itself puts before a text, or None."""
        ids = self._loaded.encode("a", add_special_tokens=True)
        return ids.tokens[0] if ids.special_tokens_mask[:1] == [1] else None

    def _special(self, argument: str, token: str | None, names: tuple[str, ...]) -> int | None:
        if token == "":
            return None
        if token is None:
            return next((i for i in map(self._loaded.token_to_id, names) if i is not None), None)
        found = self._loaded.token_to_id(token)
        if found is None:
            raise ValueError(f"{argument}={token!r}: {self.path} has no such token")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece(Tokenizer):
    """A SentencePiece model file; bos and eos are the model's own.

    Args:
        path: the `.model` file.
    """

    path: str

    @functools.cached_property
    def _loaded(self) -> Any:
        sentencepiece = require("sentencepiece")
        _check_file("SentencePiece", self.path)
        loaded = sentencepiece.SentencePieceProcessor()
        try:
            loaded.LoadFromSerializedProto(Path(self.path).read_bytes())
        except RuntimeError as error:
            raise ValueError(f"SentencePiece(path={self.path!r}): not a SentencePiece model: {error}") from error
        return loaded

    @property
    def vocab_size(self) -> int:
        return self._loaded.get_piece_size()

    @property
    def bos(self) -> int | None:
        return None if self._loaded.bos_id() < 0 else self._loaded.bos_id()

    @property
    def eos(self) -> int | None:
        return None if self._loaded.eos_id() < 0 else self._loaded.eos_id()

    def encode(self, text: str) -> Int[np.ndarray, "S"]:
        return np.array(self._loaded.encode(text), np.int32)

    def decode(self, ids: Iterable[int] | Int[np.ndarray, "S"]) -> str:
        return self._loaded.decode([int(i) for i in ids])


def check_vocabulary(tokenizer: Tokenizer, vocab: int) -> None:
    """Refuses a tokenizer whose ids a model cannot embed.

    Args:
        tokenizer: the tokenizer.
        vocab: rows of the model's embedding.

    Raises:
        ValueError: the tokenizer has more ids.
    """
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"vocab={vocab}: {tokenizer} has {tokenizer.vocab_size} ids; allowed are models with at least as many rows"
        )


def _check_file(kind: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ValueError(f"{kind}(path={path!r}): cannot be read ({error}); expected an existing file") from error
