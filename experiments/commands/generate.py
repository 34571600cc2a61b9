"""`dynamoe generate`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from ...models.generate import Sampling, generate
from ..data import Tokenizer
from ..training.restore import load_trained
from .trained_run import find_run


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a run's model, on one device.

    Without arguments: the newest run in runs/ continues "def " (the default recipe is trained first if there is none).
    """

    prompt: str = "def "
    """The text to continue."""
    run_dir: Path | None = None
    """The run's directory. None: the newest in runs/."""
    checkpoint: int | None = None
    """The checkpoint's step. None: the best."""
    tokens: int = 400
    """How many tokens to draw at most; a document's end stops earlier."""
    sampling: Sampling = Sampling()
    """How they are drawn."""
    seed: int = 0
    """The same seed draws the same text."""

    def run(self, console: Console) -> int:
        trained = load_trained(find_run(self.run_dir, console), self.checkpoint)
        tokenizer = trained.experiment.tokenizer
        prompt = prompt_ids(self.prompt, tokenizer)
        sys.stdout.write(self.prompt)
        drawn: list[int] = []
        shown = ""
        for tokens in generate(
            trained.model,
            [prompt],
            tokens=self.tokens,
            sampling=self.sampling,
            key=jax.random.key(self.seed),
            stop=tokenizer.eos,
            vocab=tokenizer.vocab_size,
        ):
            if int(tokens[0]) == tokenizer.eos:
                break
            drawn.append(int(tokens[0]))
            text = tokenizer.decode(drawn)
            # A character whose bytes have not all come yet decodes to U+FFFD: wait for the rest.
            if not text.endswith("\ufffd"):
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
        sys.stdout.write("\n")
        return 0


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """A prompt as the beginning of a document."""
    ids = tokenizer.encode(text).tolist()
    return ids if tokenizer.bos is None else [tokenizer.bos, *ids]
