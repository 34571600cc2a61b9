"""Prompts and their completions, of which the completions alone are learned."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .source import Completion, Source, Split, check_split, summarize
from .text_files import split_of_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCompletion(Source):
    """Files with one JSON object a line (.jsonl, .gz too), each a prompt and what is to follow it.

    The two are tokenized apart, the first behind the mark of a document's beginning, the second before that of its end.
    Text that is to stand between them belongs into one of them. Without `validation`, pairs are held out as texts are,
    see `TextFiles`.

    Args:
        train: paths or globs; empty to measure on `validation` alone.
        validation: the same for the held-out pairs.
        prompt: the field of the prompt; it may be empty text.
        completion: the field of the completion.
        messages: a field with a conversation instead, a list of objects with "role" and "content": each answer of the
            assistant is a completion, and all before it, each turn as "role: content" on a line of its own, its prompt.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str | None = None

    def __post_init__(self) -> None:
        if not self.train and not self.validation:
            raise ValueError("train=(): expected at least one path or glob, or validation alone to measure on")
        for name in ("prompt", "completion", "messages"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='': expected the name of a field")

    def documents(self, split: Split) -> list[Completion]:
        check_split(split)
        train, validation = split_of_files(self.train, self.validation, self._read)
        return train if split == "train" else validation

    def describe(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        splits = {split: _summary(self.documents(split)) for split in ("train", "validation")}
        return {"kind": "PromptCompletion", "files": list(self.train), **fields, **splits}

    def _read(self, argument: str, path: Path, data: bytes) -> Iterator[Completion]:
        for number, line in enumerate(data.splitlines(), 1):
            if not line.strip():
                continue
            where = f"{argument}: {path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON ({error}); expected an object a line") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} holds a {type(record).__name__}; expected an object")
            if self.messages is not None:
                yield from _answers(record.get(self.messages), f"{where}, field {self.messages!r}")
            else:
                pair = Completion(_text(record, self.prompt, where), _text(record, self.completion, where))
                if not pair.completion:
                    raise ValueError(f"{where}: field {self.completion!r} is empty; there is nothing to learn")
                yield pair


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} is {value!r}; expected text, and fields are {sorted(record)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {field!r} is no Unicode text: {error}") from error
    return value


def _answers(messages: Any, where: str) -> Iterator[Completion]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where} is {messages!r}; expected a list of messages")
    before, answers = "", 0
    for message in messages:
        turn = message if isinstance(message, dict) else {}
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or not content:
            raise ValueError(f"{where} holds {message!r}; expected an object with role and content, both text")
        if role == "assistant":
            answers += 1
            yield Completion(f"{before}{role}: ", content)
        before += f"{role}: {content}\n"
    if not answers:
        raise ValueError(f"{where} has no message of the role assistant; there is nothing to learn")


def _summary(pairs: list[Completion]) -> dict[str, Any]:
    prompts, completions = ([getattr(pair, part) for pair in pairs] for part in ("prompt", "completion"))
    return {"prompts": summarize(prompts), "completions": summarize(completions)}
