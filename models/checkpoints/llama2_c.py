"""The binary format of llama2.c, version 0 ("legacy"): Karpathy 2023, https://github.com/karpathy/llama2.c

Little endian: seven int32 (width, hidden width, layers, heads, key-value heads, vocabulary, longest sequence; negative
vocabulary: the head is not the embedding), then float32 matrices [out, in] without gaps, one kind for all layers after
another, and tables of the rotation, which are not needed. Rotary pairs are neighbours. It is read as Llama's tensors;
saving writes Llama's safetensors.
"""

import math
import struct
from pathlib import Path

from .folder import Shard, Source
from .llama import Llama
from .tensor_files import Entry

HEADER = struct.Struct("<7i")
LAYER = "model.layers.{layer}."


def is_llama2_c(path: Path) -> bool:
    """Whether a path is to be read in this format: it is a file, not a folder, that ends in .bin."""
    return path.is_file() and path.suffix == ".bin"


def open_llama2_c(path: Path) -> tuple[Source, Llama]:
    """Find the tensors in a file, and the family that reads them.

    Raises:
        ValueError: the header does not describe a file of this length.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size:
        raise ValueError(f"{path} has {size} bytes; a file of llama2.c has {HEADER.size} at least")
    width, hidden, layers, heads, kv_heads, vocab, longest = HEADER.unpack(start)
    tied, vocab = vocab > 0, abs(vocab)
    numbers = (width, hidden, layers, heads, kv_heads, vocab, longest)
    if min(numbers) < 1 or width % heads or layers * 9 > size:
        raise ValueError(f"{path} begins with {numbers}; it is no llama2.c file of version 0; pickles are not read")
    head, key_rows = width // heads, kv_heads * (width // heads)
    kinds = [
        ("input_layernorm", (width,)),
        *((f"self_attn.{name}_proj", (rows, width)) for name, rows in (("q", width), ("k", key_rows), ("v", key_rows))),
        ("self_attn.o_proj", (width, width)),
        ("post_attention_layernorm", (width,)),
        ("mlp.gate_proj", (hidden, width)),
        ("mlp.down_proj", (width, hidden)),
        ("mlp.up_proj", (hidden, width)),
    ]
    named = [("model.embed_tokens.weight", (vocab, width))]
    named += [(f"model.layers.{n}.{kind}.weight", shape) for kind, shape in kinds for n in range(layers)]
    named += [("model.norm.weight", (width,)), *[("", (longest, head // 2))] * 2]
    named += [] if tied else [("lm_head.weight", (vocab, width))]
    entries, offset = {}, HEADER.size
    for name, shape in named:
        if name:
            entries[name] = Entry(name, "F32", shape, path, offset)
        offset += 4 * math.prod(shape)
    if offset != size:
        raise ValueError(
            f"{path} has {size} bytes, and its header describes {offset}; it is truncated or another format"
        )
    config = {
        "architectures": [Llama.architecture],
        "model_type": Llama.model_type,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": longest,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    shard = Shard("model.safetensors", tuple(entries), {"format": "pt"})
    return Source(config, entries, (shard,), None, ()), Llama(neighbours=True)
