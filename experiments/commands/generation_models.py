"""The model that `dynamoe bench generation` times: ours, and transformers' with the same weights."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ...models import Attention, Decoder, DecoderLM
from ...moe import MoE, SwiGLU, TopK


class Shape(NamedTuple):
    """Of a model like Qwen3-MoE, and of what it is asked."""

    vocab: int = 16_384
    width: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_width: int = 64
    experts: int = 32
    chosen: int = 4
    hidden: int = 256
    prompt: int = 512
    """Tokens of a prompt that is read."""
    short: int = 64
    """Tokens of a prompt after which tokens are drawn."""
    tokens: int = 32
    """Tokens that are drawn."""
    batches: tuple[int, ...] = (1, 8)
    long: int = 8192
    """Slots of a cache that is hardly used."""


QWEN_LIKE = Shape()
"""Qwen3-MoE's layers at a size for a CPU: 124 million parameters."""


def decoder(shape: Shape) -> Decoder:
    """Our configuration of the model."""
    router = TopK(k=shape.chosen, renormalize=True)
    return Decoder(
        vocab=shape.vocab,
        width=shape.width,
        layers=shape.layers,
        attention=Attention(
            heads=shape.heads, kv_heads=shape.kv_heads, head_width=shape.head_width, qk_norm=True, rope_theta=10_000.0
        ),
        ffn=MoE(experts=shape.experts, router=router, expert=SwiGLU(hidden=shape.hidden), losses=()),
        norm_epsilon=1e-6,
    )


class Peer:
    """transformers' model with our weights."""

    def __init__(self, model: Any):
        self.model = model

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        import torch  # pyright: ignore[reportMissingImports]

        with torch.no_grad():
            return self.model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

    def generate(self, prompts: np.ndarray, tokens: int) -> list[list[int]]:
        import torch  # pyright: ignore[reportMissingImports]

        ids = torch.from_numpy(prompts.astype(np.int64))
        with torch.no_grad():
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
        return found[:, prompts.shape[1] :].tolist()


def transformers_model(shape: Shape, model: DecoderLM, threads: int) -> Peer:
    """The same model, of the same weights, by transformers; torch then runs on so many threads."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        norm_topk_prob=True,
        rms_norm_eps=model.config.norm_epsilon,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        max_position_embeddings=shape.long,
    )
    # The way to choose how experts run is an argument of this method alone.
    peer = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", dtype=torch.float32).eval()
    values = dict(_named_weights(shape, model))
    peer.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in values.items()})
    return Peer(peer)


def _named_weights(shape: Shape, model: DecoderLM) -> Iterator[tuple[str, np.ndarray]]:
    """Our weights by transformers' names; theirs are outputs x inputs."""
    state: Any = nnx.state(model)

    def out_first(kernel: Any, inputs: int = 1) -> np.ndarray:
        array = np.asarray(kernel[...])
        return array.reshape(int(np.prod(array.shape[:inputs])), -1).T

    yield "model.embed_tokens.weight", np.asarray(state["embedding"][...])
    yield "model.norm.weight", np.asarray(state["final_norm"]["scale"][...])
    yield "lm_head.weight", out_first(state["head_kernel"])
    for number in range(shape.layers):
        layer, name = state["segments"][number]["unit"]["layers"][0], f"model.layers.{number}"
        attention, experts = layer["attention"], layer["ffn"]["experts"]
        yield f"{name}.input_layernorm.weight", np.asarray(layer["attention_norm"]["scale"][...])
        yield f"{name}.post_attention_layernorm.weight", np.asarray(layer["ffn_norm"]["scale"][...])
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            yield f"{name}.self_attn.{theirs}.weight", out_first(attention[ours])
        yield f"{name}.self_attn.o_proj.weight", out_first(attention["output"], inputs=2)
        for theirs, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            yield f"{name}.self_attn.{theirs}.weight", np.asarray(attention[ours]["scale"][...])
        yield f"{name}.mlp.gate.weight", out_first(layer["ffn"]["router"]["gate"]["kernel"])
        gate, up, down = (np.asarray(experts[part][...]).swapaxes(1, 2) for part in ("gate", "up", "down"))
        yield f"{name}.mlp.experts.gate_up_proj", np.concatenate([gate, up], axis=1)
        yield f"{name}.mlp.experts.down_proj", down
