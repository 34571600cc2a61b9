"""OLMoE-1B-7B on 64 chips of v5p (4x4x4), from fresh weights. Muennighoff et al. 2024, https://arxiv.org/abs/2409.02060.

Sizes are those of the released model's config.json; batch, sequence length, learning rate and losses are the paper's
(5.1 T tokens in about 1.2 million steps). The text here is C4, not the paper's mixture.

Cost of a step, by the compiled program: 16.7 of 95.9 GiB a device; an estimate of 1.62 to 2.05 s (docs/scaling.md).
Tokenizer: hf download allenai/OLMoE-1B-7B-0924 tokenizer.json --local-dir tokenizers/OLMoE-1B-7B-0924
Plan: dynamoe plan experiments/recipes/olmoe_1b_7b.py --chip v5p --topology 4x4x4
Command, on every host: dynamoe train experiments/recipes/olmoe_1b_7b.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.data import HuggingFace, HuggingFaceTokenizer
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW, WarmupCosine
from dynamoe.models import Attention, Decoder, MeshShape
from dynamoe.moe import BalanceLoss, Dispatcher, DroplessDispatcher, MoE, SwiGLU, TopK, ZLoss


def recipe() -> Experiment:
    """On v5p."""
    # A layer's 64 experts are 0.8 GB in bfloat16, and 8 rows for each of a chip's 32,768 tokens would be 1.1 GB each
    # way: the experts travel, gathered over all links of the slice, and tokens stay. Nothing is dropped.
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
        tokenizer=HuggingFaceTokenizer(path="tokenizers/OLMoE-1B-7B-0924/tokenizer.json"),
        optimizer=AdamW(learning_rate=4e-4, schedule=WarmupCosine(warmup=2500, final=0.1)),
        mesh=mesh,
        steps=1_200_000,
        batch_size=batch_size,
        sequence_length=4096,
        gradient_accumulation=gradient_accumulation,
        evaluate_every=1000,
        checkpoint_every=1000,
    )


def model(dispatcher: Dispatcher) -> Decoder:
    """The published sizes. Blocks of 512 positions bound what scores and logits take."""
    return Decoder(
        vocab=50_304,
        width=2048,
        layers=16,
        attention=Attention(heads=16, projection_norm=True, query_block=512),
        ffn=MoE(
            experts=64,
            router=TopK(k=8, renormalize=False),
            expert=SwiGLU(hidden=1024),
            dispatcher=dispatcher,
            losses=(BalanceLoss(coefficient=0.01), ZLoss(coefficient=0.001)),
        ),
        norm_epsilon=1e-5,
        dtype="bfloat16",
        remat=True,
        loss_block=512,
    )
