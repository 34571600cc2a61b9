"""Qwen3-30B-A3B on 64 chips of v5p (4x4x4), from fresh weights. Yang et al. 2025, https://arxiv.org/abs/2505.09388.

Sizes are those of the released model's config.json; sequences of 4096 tokens as in the report's first two stages, with
its balance loss over the global batch. It names neither batch nor learning rate: they are ours, and so is the text, C4.

Cost of a step, by the compiled program: 40.1 of 95.9 GiB a device; an estimate of 5.23 to 7.04 s (docs/scaling.md).
Tokenizer: hf download Qwen/Qwen3-30B-A3B-Base tokenizer.json --local-dir tokenizers/Qwen3-30B-A3B
Plan: dynamoe plan experiments/recipes/qwen3_30b_a3b.py --chip v5p --topology 4x4x4
Command, on every host: dynamoe train experiments/recipes/qwen3_30b_a3b.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.data import HuggingFace, HuggingFaceTokenizer
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW, WarmupCosine
from dynamoe.models import Attention, Decoder, MeshShape
from dynamoe.moe import BalanceLoss, Dispatcher, DroplessDispatcher, MoE, SwiGLU, TopK


def recipe() -> Experiment:
    """On v5p."""
    # A layer's 128 experts are 1.2 GB in bfloat16, and 8 rows for each of a chip's 32,768 tokens would be 1.1 GB each
    # way, along fewer links: the experts travel, gathered over all links of the slice, and tokens stay.
    return experiment(
        MeshShape(data=1, fsdp=64),
        DroplessDispatcher(),
        batch_size=1024,
        gradient_accumulation=2,
    )


def experiment(
    mesh: MeshShape, dispatcher: Dispatcher, *, batch_size: int, gradient_accumulation: int = 1
) -> Experiment:
    """All but what depends on the devices."""
    return Experiment(
        model=model(dispatcher),
        source=HuggingFace(path="allenai/c4", name="en", streaming=True),
        tokenizer=HuggingFaceTokenizer(path="tokenizers/Qwen3-30B-A3B/tokenizer.json"),
        optimizer=AdamW(learning_rate=3e-4, schedule=WarmupCosine(warmup=2000, final=0.1)),
        mesh=mesh,
        steps=200_000,
        batch_size=batch_size,
        sequence_length=4096,
        gradient_accumulation=gradient_accumulation,
        evaluate_every=1000,
        checkpoint_every=1000,
    )


def model(dispatcher: Dispatcher) -> Decoder:
    """The published sizes. Blocks of 512 positions bound what scores and logits take."""
    return Decoder(
        vocab=151_936,
        width=2048,
        layers=48,
        attention=Attention(heads=32, kv_heads=4, head_width=128, rope_theta=1e6, qk_norm=True, query_block=512),
        ffn=MoE(
            experts=128,
            router=TopK(k=8),
            expert=SwiGLU(hidden=768),
            dispatcher=dispatcher,
            losses=(BalanceLoss(coefficient=0.001),),
        ),
        norm_epsilon=1e-6,
        dtype="bfloat16",
        remat=True,
        loss_block=512,
    )
