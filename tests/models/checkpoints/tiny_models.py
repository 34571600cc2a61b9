"""Tiny models of every family, in odd configurations, as transformers makes and runs them. Needs torch.

`python tests/models/checkpoints/tiny_models.py` writes those of `GOLDEN` to fixtures/: some kB each, in bfloat16,
and the logits that transformers computes from them in float32. The parity tests make all of them anew.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
GPT_OSS_ROPE = {**YARN, "rope_theta": 1.5e5, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 6}

GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_biased": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 6,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
    "qwen3": (
        "Qwen3",
        {
            "head_dim": 6,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 7}),
    "olmoe": (
        "Olmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "clip_qkv": 0.7,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**QWEN3_MOE, "norm_topk_prob": True, "mlp_only_layers": [1], "rope_parameters": YARN},
    ),
    "granite_moe": (
        "GraniteMoe",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "embedding_multiplier": 6.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, "n_shared_experts": 2, "topk_method": "group_limited_greedy",
         "routed_scaling_factor": 2.0},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**LATENT, "q_lora_rank": 9, "n_shared_experts": 1, "num_mtp_layers": 0, "num_hidden_layers": 3,
         "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 8, "sliding_window": 5, "num_local_experts": 3, "num_experts_per_tok": 2,
         "rope_parameters": GPT_OSS_ROPE},
    ),
    "gpt_oss_packed": (
        "GptOss",
        {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "sliding_window": 5,
         "layer_types": ["sliding_attention"] * 2,
         "num_local_experts": 3, "num_experts_per_tok": 2, "rope_parameters": GPT_OSS_ROPE},
    ),
}  # fmt: skip

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_plain": ("Llama", {"num_key_value_heads": 4, "hidden_size": 24}),
    "llama_multi_query": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3_plain": ("Qwen3", {"head_dim": 10, "attention_bias": True}),
    "mixtral_wide_heads": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 10}),
    "olmoe_plain": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3_moe_every_second": (
        "Qwen3Moe",
        {**QWEN3_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "use_sliding_window": True,
         "sliding_window": 6},
    ),
    "granite_moe_tied": (
        "GraniteMoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True, "attention_multiplier": 0.5},
    ),
    "deepseek_v2_greedy": ("DeepseekV2", {**LATENT, "q_lora_rank": 7, "n_shared_experts": 1, "topk_method": "greedy"}),
    "deepseek_v3_halves": (
        "DeepseekV3",
        {**LATENT, "q_lora_rank": None, "n_shared_experts": 2, "num_mtp_layers": 0, "rope_interleave": False,
         "norm_topk_prob": False},
    ),
    "gpt_oss_wide": ("GptOss", {"head_dim": 6, "sliding_window": 3, "num_hidden_layers": 3, "num_local_experts": 4,
                               "num_experts_per_tok": 3, "swiglu_limit": 0.5}),
}  # fmt: skip


def build(name: str) -> Any:
    """A model with random numbers everywhere, also in norms and biases, in float32."""
    kind, options = (GOLDEN | MORE)[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager")
    draw = torch.Generator().manual_seed(7)
    tensors = [*model.named_parameters(), *(pair for pair in model.named_buffers() if "correction_bias" in pair[0])]
    with torch.no_grad():
        for path, tensor in tensors:
            mean, deviation = (1.0 if "norm" in path else 0.0), (0.3 if tensor.ndim == 1 else 0.2)
            tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=draw))
            tensor.copy_(tensor.bfloat16().float())  # what the files hold in bfloat16 is then the same
    return model.float().eval()


def tokens(name: str, rows: int = 2, length: int = 24) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(len(name)).integers(0, SMALL["vocab_size"], (rows, length), np.int32)


def logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None, positions: np.ndarray | None = None) -> Any:
    """What transformers computes."""
    options = {} if positions is None else {"position_ids": torch.from_numpy(positions).long()}
    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask).long()
        return model(torch.from_numpy(ids).long(), attention_mask=mask, **options).logits.numpy()


def packed(model: Any, folder: Path) -> None:
    """Replace the experts of a gpt-oss model by packed ones with random codes, here and in its saved files.

    The numbers that the codes stand for are transformers' own.
    """
    draw = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for layer, block in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            experts, inputs, outputs = getattr(block.mlp.experts, name).shape
            blocks = torch.from_numpy(draw.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8))
            scales = torch.from_numpy(draw.integers(121, 127, blocks.shape[:3], np.uint8))
            whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            getattr(block.mlp.experts, name).data = whole.reshape(experts, inputs, outputs)
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[prefix]
            tensors |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    packing = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": packing}, indent=2) + "\n")


def write(name: str, folder: Path) -> None:
    """A golden folder: config.json, model.safetensors, expected.npz."""
    model = build(name)
    copy.deepcopy(model).bfloat16().save_pretrained(folder)  # a copy: the rotary frequencies would be rounded too
    (folder / "generation_config.json").unlink()
    if name.endswith("_packed"):
        packed(model, folder)
    ids = tokens(name)
    np.savez_compressed(folder / "expected.npz", tokens=ids.astype(np.uint8), logits=logits(model, ids))


if __name__ == "__main__":
    for name in GOLDEN:
        write(name, Path(__file__).parent / "fixtures" / name)
