"""One long text in windows that do not overlap: how perplexities of published models are measured.

As in GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) and the papers after it: the documents of a split in
one text, its tokens cut into windows of S, each read by itself; of each window the first token is no target. What is
left after the last whole window is left out. Letters: B batch, S sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .packing import empty_window, encode_checked, lay_out, stack
from .pipeline import HeldOut
from .tokenizers import Tokenizer

BETWEEN = "\n\n"
"""Stands between documents."""


class Concatenated(NamedTuple):
    """A text ready to score, and what was not taken of it."""

    text: HeldOut
    left_out: int
    """Tokens after the last whole window."""


def concatenated(
    documents: Sequence[str], tokenizer: Tokenizer, *, batch_size: int, sequence_length: int
) -> Concatenated:
    """A text's windows.

    Args:
        documents: joined by an empty line.
        tokenizer: its bos stands once, before the text, if it has one; no eos.
        batch_size: B, windows at once.
        sequence_length: S, tokens of a window. A text that is shorter is one short window.

    Raises:
        ValueError: a number is out of bounds, or the text has less than two tokens.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: allowed are 1 and above")
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}: allowed are 2 and above, for the first is no target")
    text = BETWEEN.join(documents)
    ids = encode_checked([(0, text)], tokenizer)[0].ids
    if tokenizer.eos is not None:
        ids = ids[:-1]
    if ids.size < 2:
        raise ValueError(f"the text has {ids.size} tokens by {tokenizer}; at least two are needed")
    length = min(sequence_length, ids.size)
    whole = ids.size // length
    none = np.zeros(0, np.int32)
    rows = [lay_out(ids[n * length : (n + 1) * length], none, length) for n in range(whole)]
    rows += [empty_window(length)] * (-whole % batch_size)
    batches = [stack(rows[n : n + batch_size]) for n in range(0, len(rows), batch_size)]
    held = HeldOut(batches, len(text.encode()), len(documents), whole * (length - 1))
    return Concatenated(held, ids.size - whole * length)
