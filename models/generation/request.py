"""What is asked of the engine."""

import enum
from dataclasses import dataclass


class Finish(enum.Enum):
    """Why a request has ended."""

    STOP = "stop"
    """It drew one of its stop tokens, or its text met a stop string."""
    LENGTH = "length"
    """It drew as many tokens as it may."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Continue a prompt. What is drawn depends on the request, the model and the sampler, and on no other request."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int
    """How many tokens to draw at most."""
    seed: int = 0
    """The same seed draws the same tokens; another request should have another."""
    stop_tokens: tuple[int, ...] = ()
    """Any of these, drawn, ends the request; it is still handed out."""

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("Request.prompt is empty; it needs at least one token")
        if self.max_tokens < 1:
            raise ValueError(f"Request.max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Request.seed is {self.seed}; it must be from 0 to {2**32 - 1}")

    def check(self, *, slots: int, vocab: int) -> None:
        """Refuse what a model of `vocab` tokens with `slots` in its cache cannot do.

        Raises:
            ValueError: an id is outside the vocabulary, or prompt and answer are longer than the cache.
        """
        for name, tokens in (("prompt", self.prompt), ("stop_tokens", self.stop_tokens)):
            if wrong := [token for token in tokens if not 0 <= token < vocab]:
                raise ValueError(f"Request.{name} holds the token id {wrong[0]}; allowed are 0 to {vocab - 1}")
        if len(self.prompt) > slots:
            raise ValueError(
                f"Request.prompt has {len(self.prompt)} tokens; the cache holds {slots}: shorten the prompt, or give "
                "more slots"
            )
        # The last token that is drawn need not be held.
        if (needed := len(self.prompt) + self.max_tokens - 1) > slots:
            raise ValueError(
                f"Request.prompt has {len(self.prompt)} tokens and max_tokens is {self.max_tokens}: the cache needs "
                f"{needed} slots, and has {slots}; ask for fewer tokens, or give more slots"
            )
