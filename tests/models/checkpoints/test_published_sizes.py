"""Configurations of published models, abridged to what matters: do their tensors add up to the stated sizes?"""

import math

import pytest

from dynamoe.models.checkpoints.fields import Fields
from dynamoe.models.checkpoints.registry import family_of
from dynamoe.models.rotary import Yarn

YARN = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
PUBLISHED = {
    "Llama-3.1-8B": (
        8.03,
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
    ),
    "Qwen3-0.6B": (
        0.596,
        {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
         "tie_word_embeddings": True},
    ),
    "Mixtral-8x7B": (
        46.7,
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
         "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "OLMoE-1B-7B-0924": (
        6.92,
        {"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
         "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304, "num_experts": 64,
         "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None, "rope_scaling": None},
    ),
    "Qwen3-30B-A3B": (
        30.5,
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
         "mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None},
    ),
    "DeepSeek-V2-Lite": (
        15.7,
        {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
         "num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None,
         "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
         "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
         "n_group": 1, "topk_group": 1, "vocab_size": 102400, "scoring_func": "softmax", "rope_scaling": YARN},
    ),
    "DeepSeek-V3": (
        671,
        {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
         "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536,
         "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
         "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "topk_method": "noaux_tc",
         "n_group": 8, "topk_group": 4, "vocab_size": 129280, "scoring_func": "sigmoid", "rope_scaling": YARN},
    ),
    "gpt-oss-20b": (
        20.9,
        {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
         "num_local_experts": 32, "num_experts_per_tok": 4, "rope_theta": 150000},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_add_up_to_the_stated_size(name):
    billions, config = PUBLISHED[name]
    fields = Fields(config)
    family = family_of(fields)
    decoder = family.decoder(fields)
    total = sum(math.prod(tensor.shape) for tensor in family.tensors(fields, decoder) if tensor.same_as is None)
    assert float(f"{total / 1e9:.3g}") == billions
    if name.startswith("DeepSeek"):
        attention = decoder.attention.at(0)
        # Both factors of its yarn are 1: nothing on queries and keys, (0.1 ln 40 + 1)^2 on the scores.
        assert isinstance(attention.scaling, Yarn) and attention.scaling.magnitude == 1
        assert attention.scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))
