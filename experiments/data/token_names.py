"""Tokens as a person reads them in a table."""

from .tokenizers import Bytes, Tokenizer

_SHOWN = {" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token id on one line, spaces as ␣, marks as <bos> and <eos>, a byte that is no text of its own as
    \\xe4, and what has no text at all as its number, <1234>."""
    if token in (tokenizer.bos, tokenizer.eos):
        return "<bos>" if token == tokenizer.bos else "<eos>"
    if isinstance(tokenizer, Bytes) and 128 <= token < 256:
        return f"\\x{token:02x}"
    text = tokenizer.decode([token]) if 0 <= token < tokenizer.vocab_size else ""
    if not text or "\ufffd" in text:
        return f"<{token}>"
    return "".join(_SHOWN.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
