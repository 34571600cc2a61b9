"""The files of llama2.c: a synthetic one against Llama's own tensors, and the real stories260K."""

import math
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models.checkpoints import from_pretrained, save_pretrained

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH = NUMBERS = (8, 12, 2, 2, 1, 16, 10)
SIZES = (
    *(VOCAB * WIDTH, LAYERS * WIDTH, LAYERS * WIDTH**2, LAYERS * WIDTH * 4, LAYERS * WIDTH * 4, LAYERS * WIDTH**2),
    *(LAYERS * WIDTH, LAYERS * HIDDEN * WIDTH, LAYERS * HIDDEN * WIDTH, LAYERS * HIDDEN * WIDTH, WIDTH, 2 * LENGTH * 2),
)
DATA = Path(os.environ.get("DYNAMOE_DATA", "nowhere"))


def content(numbers=NUMBERS, extra=0):
    values = np.random.default_rng(0).normal(size=sum(SIZES) + extra).astype("<f4")
    return struct.pack("<7i", *numbers) + values.tobytes(), np.split(values, np.cumsum(SIZES))


def test_tensors_lie_where_the_format_says_and_pairs_are_parted(tmp_path):
    data, parts = content()
    (tmp_path / "model.bin").write_bytes(data)
    model = from_pretrained(tmp_path / "model.bin").model
    second = model.segments[1].unit.layers[0]
    np.testing.assert_array_equal(model.embedding[...], parts[0].reshape(VOCAB, WIDTH))
    np.testing.assert_array_equal(second.ffn.down[...], parts[8].reshape(LAYERS, WIDTH, HIDDEN)[1].T)
    np.testing.assert_array_equal(second.ffn.up[...], parts[9].reshape(LAYERS, HIDDEN, WIDTH)[1].T)
    query = parts[2].reshape(LAYERS, HEADS, 4, WIDTH)[1]  # pairs (0, 1), (2, 3) become (0, 2), (1, 3)
    np.testing.assert_array_equal(second.attention.query[...], query[:, [0, 2, 1, 3]].transpose(2, 0, 1))
    np.testing.assert_array_equal(model.final_norm.scale[...], parts[10])
    assert model.config.tied and model.config.attention.kv_heads == 1


def test_it_is_saved_as_llamas_safetensors_of_the_same_function(tmp_path):
    (tmp_path / "model.bin").write_bytes(content()[0])
    read = from_pretrained(tmp_path / "model.bin")
    save_pretrained(read, tmp_path / "out")
    again = from_pretrained(tmp_path / "out")
    for array, other in zip(*(jax.tree.leaves(nnx.state(p.model)) for p in (read, again)), strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08\x00", "has 2 bytes; a file of llama2.c has 28 at least"),
        (content()[0][:-4], "it is truncated or another format"),
        (content(extra=1)[0], "it is truncated or another format"),
        (content((8, 12, 2**31 - 1, 2, 1, 16, 10))[0], "it is no llama2.c file"),
        (content((-8, 12, 2, 2, 1, 16, 10))[0], "it is no llama2.c file"),
        (b"PK\x03\x04" * 20, "it is no llama2.c file of version 0; pickles are not read"),
    ],
)
def test_a_broken_file_is_refused(data, message, tmp_path):
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "model.bin")


@pytest.mark.skipif(not (DATA / "stories260K").is_dir(), reason="needs the folder stories260K in DYNAMOE_DATA")
def test_stories260k_has_its_published_bits_per_byte():
    # Published: 0.8132, each story up to 128 tokens, over the bytes that those stand for.
    pieces = _pieces(DATA / "stories260K" / "tok512.bin")
    text = (DATA / "tinystories_text" / "validation_100.txt").read_text(encoding="utf-8")
    stories = [_encode(story.lstrip(), pieces)[:128] for story in text.split("<|endoftext|>") if story.strip()]
    ids = np.zeros((len(stories), 128), np.int32)
    for row, story in enumerate(stories):
        ids[row, : len(story)] = story
    graph, state = nnx.split(from_pretrained(DATA / "stories260K" / "stories260K.bin").model)
    logs = jax.jit(lambda state, ids: jax.nn.log_softmax(nnx.merge(graph, state)(ids).logits))(state, jnp.asarray(ids))
    real = np.arange(127)[None] < np.array([len(story) - 1 for story in stories])[:, None]
    chosen = np.take_along_axis(np.asarray(logs, np.float64)[:, :-1], ids[:, 1:, None], axis=2)[:, :, 0]
    spelled = {number: piece for piece, (number, _) in pieces.items()}
    # Ids 3 to 258 are single bytes; a story's first piece begins with a space that is not in the text.
    count = sum(1 if 3 <= token < 259 else len(spelled[token]) for story in stories for token in story[1:])
    assert round(-chosen[real].sum() / math.log(2) / (count - len(stories)), 4) == 0.8132


def _pieces(path):
    """Piece -> (id, score), out of llama2.c's tokenizer.bin."""
    data, at, pieces = path.read_bytes(), 4, {}
    for number in range(512):
        score, length = struct.unpack_from("<fi", data, at)
        pieces[data[at + 8 : at + 8 + length]] = (number, score)
        at += 8 + length
    return pieces


def _encode(text, pieces):
    """Merge the neighbours with the highest score, from code points on."""
    spelled = {number: piece for piece, (number, _) in pieces.items()}
    ids = [1, pieces[b" "][0]]
    for letter in (character.encode() for character in text):
        ids += [pieces[letter][0]] if letter in pieces else [byte + 3 for byte in letter]
    while True:
        pairs = [
            (pieces.get(spelled[a] + spelled[b]), place) for place, (a, b) in enumerate(zip(ids, ids[1:], strict=False))
        ]
        known = [(found[1], -place, found[0]) for found, place in pairs if found is not None]
        if not known:
            return ids
        _, place, merged = max(known)
        ids[-place : 2 - place] = [merged]
