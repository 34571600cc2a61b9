"""`dynamoe generate`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from rich.console import Console

from ...models import DecoderLM
from ...models.generate import Sampling, generate
from ..data import Tokenizer
from ..training.restore import load_trained
from .place_option import PlaceOption
from .trained_run import find_run


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a run's model, on one device.

    Without arguments: the newest run in runs/ continues "def " (the default recipe is trained first if there is none).
    """

    prompt: str = "def "
    """The text to continue."""
    run_dir: PlaceOption | None = None
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
        sys.stdout.write(self.prompt)
        for text in continuation(
            trained.model, tokenizer, self.prompt, tokens=self.tokens, sampling=self.sampling, seed=self.seed
        ):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0


def continuation(
    model: DecoderLM, tokenizer: Tokenizer, prompt: str, *, tokens: int, sampling: Sampling, seed: int
) -> Iterator[str]:
    """What follows a prompt at the beginning of a document, piece by piece, up to the document's end."""
    ids = tokenizer.encode(prompt).tolist()
    ids = ids if tokenizer.bos is None else [tokenizer.bos, *ids]
    # Decoded together with the prompt: a tokenizer may treat the first token of a text in its own way.
    shown = tokenizer.decode(ids)
    drawn = generate(
        model,
        [list(ids)],
        tokens=tokens,
        sampling=sampling,
        key=jax.random.key(seed),
        stop=tokenizer.eos,
        vocab=tokenizer.vocab_size,
    )
    for token in drawn:
        if int(token[0]) == tokenizer.eos:
            break
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        # A character whose bytes have not all come yet decodes to U+FFFD: wait for the rest.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]
