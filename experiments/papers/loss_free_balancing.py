"""Loss-free balancing: a bias evens the experts' loads, and leaves the gradient alone.

Wang, Gao, Zhao, Sun, Dai 2024, https://arxiv.org/abs/2408.15664.

Claim: A bias on the scores by which experts are chosen, moved by 0.001 after each batch, evens the loads better than an
auxiliary loss (MaxVio on held-out text 0.04 against 0.72) and reaches a lower perplexity (9.50 against 9.56).

Command: dynamoe reproduce loss_free_balancing

Cost: 15 runs of about a minute on a 2-core CPU.

The paper's numbers are those of its 1B model, coefficient 0.001 (Table 2), as remembered; the paper itself was not at
hand when this was written. 9.50 against 9.56 are 0.006 nats per token.

What is the same: sigmoid scores, not renormalised, fine-grained experts beside a shared one, the rate 0.001 and the
coefficient 0.001, MaxVio of the whole held-out text.

What differs: a decoder of 0.3 million parameters on bytes of Python, 16 experts of which a token takes 4 (the paper: 64
and 6), 0.8 million tokens in 200 batches in place of 100 billion in some 40,000, Muon in place of AdamW. In 200 batches
a bias of rate 0.001 moves by 0.2 at most, so an arm of rate 0.01 is run besides; nothing is claimed of it, nor of the
arms with the coefficient 0.01, usual elsewhere, and without any balancing.
"""

# A paper's file imports as a user's own does; pyright sees the checkout under another name.
# pyright: reportMissingImports=false

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import Muon
from dynamoe.experiments.reproduction import BITS_PER_BYTE, MAX_VIOLATION, Lower, Paper
from dynamoe.models import Attention, Decoder
from dynamoe.moe import BalanceLoss, LossFree, MoE, RouterLoss, Sigmoid, SwiGLU, TopK


def paper() -> Paper:
    return Paper(
        about=__doc__ or "",
        arms={
            "no-balancing": experiment(),
            "loss-0.001": experiment(BalanceLoss(coefficient=0.001)),
            "loss-0.01": experiment(BalanceLoss(coefficient=0.01)),
            "bias-0.001": experiment(balancing=LossFree(rate=0.001)),
            "bias-0.01": experiment(balancing=LossFree(rate=0.01)),
        },
        measures=(BITS_PER_BYTE, MAX_VIOLATION),
        # Written before the runs. A difference below 0 means that the bias is better.
        claims=(
            Lower(
                says="The bias evens the experts' loads better than the auxiliary loss.",
                published="MaxVio 0.04 against 0.72 (Table 2)",
                measure=MAX_VIOLATION,
                arm="bias-0.001",
                than="loss-0.001",
            ),
            Lower(
                says="The model with the bias is better than that with the auxiliary loss.",
                published="-0.006 nats per token (Table 2)",
                measure=BITS_PER_BYTE,
                arm="bias-0.001",
                than="loss-0.001",
            ),
        ),
    )


def experiment(*losses: RouterLoss, balancing: LossFree | None = None) -> Experiment:
    """All but what balances the experts."""
    return Experiment(
        model=Decoder(
            vocab=264,
            width=64,
            layers=2,
            attention=Attention(heads=2, qk_norm=True),
            ffn=MoE(
                experts=16,
                router=TopK(k=4, scores=Sigmoid(), renormalize=False, balancing=balancing),
                expert=SwiGLU(hidden=32),
                shared=SwiGLU(hidden=64),
                losses=losses,
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
