"""Mixtral 8x7B on 64 chips of v5p (4x4x4), from fresh weights. Jiang et al. 2024, https://arxiv.org/abs/2401.04088.

Sizes are those of the released model's config.json. The paper says nothing of the training: batch, learning rate and
schedule are ours, and so is the text, C4. Sequences of 4096 tokens keep attention at a tenth of the work.

Cost of a step of 1.05 million tokens, from the compiled program: 33.2 of 95.9 GiB of a chip; an estimate of 4.8 s where
all overlaps, 5.4 s where nothing does (docs/scaling.md).
Tokenizer: hf download mistralai/Mixtral-8x7B-v0.1 tokenizer.json --local-dir tokenizers/Mixtral-8x7B-v0.1
Plan: dynamoe plan experiments/recipes/mixtral_8x7b.py --chip v5p --topology 4x4x4
Command, on every host: dynamoe train experiments/recipes/mixtral_8x7b.py --distributed
"""

# A recipe is run by its path, so it imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.data import HuggingFace, HuggingFaceTokenizer
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW, WarmupCosine
from dynamoe.models import Attention, Decoder, MeshShape
from dynamoe.moe import AllToAll, BalanceLoss, CapacityDispatcher, Dispatcher, ExpertParallel, MoE, SwiGLU, TopK


def recipe() -> Experiment:
    """On v5p."""
    # Two experts a chip, along one side of the slice, so that a token's exchange stays on a ring of 4; the weights are
    # split over the other two sides. An exchange of 2 * 1.25 rows a token takes about as long as gathering all experts
    # would, and holds 2 experts' weights instead of 8.
    return experiment(
        MeshShape(data=1, fsdp=16, expert=4),
        ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(capacity_factor=1.25))),
        batch_size=256,
        gradient_accumulation=1,
    )


def experiment(
    mesh: MeshShape, dispatcher: Dispatcher, *, batch_size: int, gradient_accumulation: int = 1
) -> Experiment:
    """All but what depends on the devices."""
    return Experiment(
        model=model(dispatcher),
        source=HuggingFace(path="allenai/c4", name="en", streaming=True),
        tokenizer=HuggingFaceTokenizer(path="tokenizers/Mixtral-8x7B-v0.1/tokenizer.json"),
        optimizer=AdamW(learning_rate=3e-4, schedule=WarmupCosine(warmup=2000, final=0.1)),
        mesh=mesh,
        steps=100_000,
        batch_size=batch_size,
        sequence_length=4096,
        gradient_accumulation=gradient_accumulation,
        evaluate_every=1000,
        checkpoint_every=1000,
    )


def model(dispatcher: Dispatcher) -> Decoder:
    """The published sizes. Blocks of 512 positions bound what scores and logits take."""
    return Decoder(
        vocab=32_000,
        width=4096,
        layers=32,
        attention=Attention(heads=32, kv_heads=8, rope_theta=1e6, query_block=512),
        ffn=MoE(
            experts=8,
            router=TopK(k=2),
            expert=SwiGLU(hidden=14_336),
            dispatcher=dispatcher,
            losses=(BalanceLoss(coefficient=0.02),),
        ),
        norm_epsilon=1e-5,
        dtype="bfloat16",
        remat=True,
        loss_block=512,
    )
