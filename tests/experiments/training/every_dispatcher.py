"""A recipe for tests: a tiny model in which each layer has another dispatcher, some of which drop."""

from dataclasses import dataclass

from dynamoe.experiments.data import TextFiles
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW
from dynamoe.models import Attention, Decoder
from dynamoe.moe import (
    AllGather,
    AllToAll,
    CapacityDispatcher,
    DenseDispatcher,
    DroplessDispatcher,
    ExpertParallel,
    FeedForward,
    LossFree,
    MoE,
    RaggedAllToAll,
    SwiGLU,
    TopK,
)

LENGTH = 16
TIGHT = CapacityDispatcher(capacity_factor=1.0, routing_group=LENGTH)
DISPATCHERS = (
    DroplessDispatcher(),
    TIGHT,
    DenseDispatcher(),
    CapacityDispatcher(capacity_factor=1.0),
    ExpertParallel(exchange=AllToAll(capacity=TIGHT)),
    ExpertParallel(exchange=RaggedAllToAll(room=8.0)),
    ExpertParallel(exchange=AllGather()),
)


@dataclass(frozen=True, kw_only=True)
class OneForEachLayer:
    """A mixture for each dispatcher."""

    dispatchers: tuple = DISPATCHERS

    def at(self, layer: int) -> FeedForward:
        return MoE(
            experts=8,
            router=TopK(k=2, balancing=LossFree(rate=0.01)),
            expert=SwiGLU(hidden=16),
            shared=SwiGLU(hidden=16),
            dispatcher=self.dispatchers[layer % len(self.dispatchers)],
        )


def recipe() -> Experiment:
    layers = 2 * len(DISPATCHERS)  # stacked and scanned, as two units
    return Experiment(
        model=Decoder(vocab=264, width=16, layers=layers, attention=Attention(heads=2), ffn=OneForEachLayer()),
        source=TextFiles(train=("text.txt",), separator="\n\n"),
        optimizer=AdamW(learning_rate=1e-2),
        steps=4,
        batch_size=16,
        sequence_length=LENGTH,
        log_every=1,
        checkpoint_every=2,
        evaluate_every=4,
    )
