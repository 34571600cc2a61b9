"""Switch Transformer: one expert per token is enough.

Fedus, Zoph, Shazeer 2021, https://arxiv.org/abs/2101.03961.

Claim: At equal FLOPs per token a top-1 mixture beats the dense model (negative log perplexity after 100k steps -1.561
against -1.731), and it beats top-2 routing where experts have few places (-1.561 against -1.572 at capacity factor 1.0,
-1.553 against -1.559 at 1.25).

Command: dynamoe reproduce switch_transformer

Cost: 15 runs of about a minute on a 2-core CPU.

The paper's numbers are those of its Table 1: T5-Base, Switch-Base and MoE-Base on C4.

What is the same: all arms of a seed see the same batches in the same order; the balance loss has the paper's
coefficient 0.01; a capacity factor c gives an expert c times (tokens / experts) places, for top-2 as for top-1, so at
equal c top-2 does no more expert work than top-1; first choices find places before second ones, as in GShard.

What differs: a decoder of 0.8 million parameters on bytes of Python in place of T5 on C4, every layer a mixture and
not every second, 16 experts with SwiGLU, 0.8 million tokens, Muon in place of Adafactor, no input jitter; a second
choice is always taken, where GShard draws it at random by its weight. GShard's order lets a later token's first choice
displace an earlier token's second one. A causal model may learn something from that: it can only help top-2.
"""

# A paper's file imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import Muon
from dynamoe.experiments.reproduction import BITS_PER_BYTE, DROPPED, Lower, Paper
from dynamoe.models import Attention, Decoder, Dense
from dynamoe.moe import CapacityDispatcher, Dispatcher, FeedForward, FirstChoicesFirst, MoE, SwiGLU, TopK


def paper() -> Paper:
    return Paper(
        about=__doc__ or "",
        arms={
            # The router's FLOPs are worth 5.3 columns of hidden width; the dense model gets 6.
            "dense": experiment(Dense(hidden=HIDDEN + 6)),
            "top1-capacity-1.0": experiment(top1(1.0)),
            "top1-capacity-1.25": experiment(top1(1.25)),
            "top2-capacity-1.0": experiment(top2(1.0)),
            "top2-capacity-1.25": experiment(top2(1.25)),
        },
        measures=(BITS_PER_BYTE, DROPPED),
        # Written before the runs. A difference below 0 means that top-1 is better.
        claims=(
            Lower(
                says="Top-1 routing at capacity factor 1.0 beats the dense model at equal FLOPs per token.",
                published="-0.170 nats per token (Table 1, Switch-Base and T5-Base)",
                measure=BITS_PER_BYTE,
                arm="top1-capacity-1.0",
                than="dense",
            ),
            Lower(
                says="Top-1 routing beats top-2 at capacity factor 1.0.",
                published="-0.011 nats per token (Table 1)",
                measure=BITS_PER_BYTE,
                arm="top1-capacity-1.0",
                than="top2-capacity-1.0",
            ),
            Lower(
                says="Top-1 routing beats top-2 at capacity factor 1.25.",
                published="-0.006 nats per token (Table 1)",
                measure=BITS_PER_BYTE,
                arm="top1-capacity-1.25",
                than="top2-capacity-1.25",
            ),
        ),
    )


HIDDEN, EXPERTS = 128, 16


def experiment(ffn: FeedForward) -> Experiment:
    """All but the feed-forward networks."""
    return Experiment(
        model=Decoder(
            vocab=264,
            width=64,
            layers=2,
            attention=Attention(heads=2, qk_norm=True),
            ffn=ffn,
            unroll=2,
            allow_look_ahead=isinstance(ffn, MoE) and ffn.looks_ahead,
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


def top1(capacity: float) -> MoE:
    return mixture(TopK(k=1, renormalize=False), CapacityDispatcher(capacity_factor=capacity))


def top2(capacity: float) -> MoE:
    # Ours counts places as a multiple of an even share of the *assignments*, of which top-2 has two a token.
    return mixture(TopK(k=2), CapacityDispatcher(capacity_factor=capacity / 2, order=FirstChoicesFirst()))


def mixture(router: TopK, dispatcher: Dispatcher) -> MoE:
    return MoE(experts=EXPERTS, router=router, expert=SwiGLU(hidden=HIDDEN), dispatcher=dispatcher)
