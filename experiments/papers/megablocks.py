"""MegaBlocks: mixtures of experts that drop no token, at no loss of speed.

Gale, Narayanan, Young, Zaharia 2022, https://arxiv.org/abs/2211.15841.

Claim: A mixture that drops no token reaches a lower loss than one whose experts have a fixed number of places, and
trains up to 40% faster than Tutel's best configuration, which must drop tokens or pad.

Command: dynamoe reproduce megablocks

Cost: 12 runs of about a minute on a 2-core CPU, 6 of which switch_transformer shares, and a minute of timing steps.

The 40% are from the abstract, and are end to end on 8 A100s. That the loss falls as the capacity factor grows and is
lowest without dropping is as remembered from its Figure 2; the paper itself was not at hand when this was written.

What is the same: top-1 routing, the same experts and batches in all arms, capacity factors 1.0, 1.25 and 2.0 against
sorted assignments and grouped matrix products.

What differs: a decoder of 0.8 million parameters on bytes of Python in place of GPT-2's sizes on the Pile, every layer
with 16 experts and not 64, SwiGLU, 0.8 million tokens, a CPU. The speed is that of a grouped matmul in C++ against
XLA's batched product over padded buffers on one machine: it says nothing about a GPU's block-sparse kernels. Step
times are ratios of steps in turns, measured apart from the runs; `--measure-again` does it anew on a quiet machine.
"""

# A paper's file imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import Muon
from dynamoe.experiments.reproduction import BITS_PER_BYTE, DROPPED, Faster, Lower, Paper
from dynamoe.models import Attention, Decoder
from dynamoe.moe import CapacityDispatcher, Dispatcher, DroplessDispatcher, MoE, SwiGLU, TopK


def paper() -> Paper:
    return Paper(
        about=__doc__ or "",
        arms={
            "dropless": experiment(DroplessDispatcher()),
            "capacity-1.0": experiment(CapacityDispatcher(capacity_factor=1.0)),
            "capacity-1.25": experiment(CapacityDispatcher(capacity_factor=1.25)),
            "capacity-2.0": experiment(CapacityDispatcher(capacity_factor=2.0)),
        },
        measures=(BITS_PER_BYTE, DROPPED),
        # Written before the runs. Few tokens are dropped at 2.0, so there the claim is equal loss in less time.
        claims=(
            Lower(
                says="Dropping nothing beats capacity factor 1.0.",
                published="lower (Figure 2)",
                measure=BITS_PER_BYTE,
                arm="dropless",
                than="capacity-1.0",
            ),
            Lower(
                says="Dropping nothing beats capacity factor 1.25.",
                published="lower (Figure 2)",
                measure=BITS_PER_BYTE,
                arm="dropless",
                than="capacity-1.25",
            ),
            Lower(
                says="Dropping nothing is no worse than capacity factor 2.0, by 0.02 bits per byte at most.",
                published="no higher (Figure 2)",
                measure=BITS_PER_BYTE,
                arm="dropless",
                than="capacity-2.0",
                bound=0.02,
            ),
            Faster(
                says="A step without dropping takes less time than one at capacity factor 2.0.",
                published="up to 1.4 times as fast, end to end (abstract)",
                arm="dropless",
                than="capacity-2.0",
            ),
        ),
    )


def experiment(dispatcher: Dispatcher) -> Experiment:
    """All but how tokens are carried to experts."""
    return Experiment(
        model=Decoder(
            vocab=264,
            width=64,
            layers=2,
            attention=Attention(heads=2, qk_norm=True),
            ffn=MoE(
                experts=16,
                router=TopK(k=1, renormalize=False),
                expert=SwiGLU(hidden=128),
                dispatcher=dispatcher,
            ),
            unroll=2,
        ),
        optimizer=Muon(learning_rate=2e-2),
        steps=200,
        batch_size=32,
        sequence_length=128,
        evaluate_every=200,
        evaluation_bytes=100_000,
        checkpoint_every=200,
        keep_last=1,
        keep_best=0,
    )
