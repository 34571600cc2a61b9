"""A published model trained on, and given back."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import Exits
from dynamoe.experiments.data import Bytes, PromptCompletion
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW
from dynamoe.experiments.published import published_model
from dynamoe.experiments.run_directory import read_metrics
from dynamoe.experiments.training.published_weights import check_published, check_tokenizer, published_again
from dynamoe.experiments.training.restore import load_trained
from dynamoe.experiments.training.train import train
from dynamoe.models.checkpoints import from_pretrained
from dynamoe.moe import Copy, DenseDispatcher, MoE, SwiGLU, TopK

Dynamoe = Callable[..., tuple[int, str, str]]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 5)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Bytes):
    """Bytes within a small vocabulary."""

    @property
    def vocab_size(self) -> int:
        return 32

    bos = 1
    eos = 2

    def encode(self, text: str) -> np.ndarray:
        return super().encode(text) % 29 + 3


@pytest.fixture
def experiment(published: Path, tmp_path: Path) -> Experiment:
    """Three steps on prompts and completions."""
    rng = np.random.default_rng(0)
    words = lambda count: " ".join(f"w{number}" for number in rng.integers(4, 32, count))  # noqa: E731
    pairs = [json.dumps({"prompt": words(6), "completion": words(4)}) for _ in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    model, tokenizer = published_model(published)
    return Experiment(
        model=model,
        tokenizer=tokenizer,
        source=PromptCompletion(train=(str(tmp_path / "pairs.jsonl"),)),
        optimizer=AdamW(learning_rate=1e-2),
        steps=3,
        batch_size=4,
        sequence_length=16,
        log_every=1,
    )


def test_begins_from_the_published_numbers_and_is_given_back(
    dynamoe: Dynamoe, published: Path, experiment: Experiment, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(experiment, run, init_from=published)
    first = [line["loss"] for line in read_metrics(run) if line["split"] == "train"]
    untrained = train(dataclasses.replace(experiment, steps=1), tmp_path / "other").path
    assert first[0] != read_metrics(untrained)[0]["loss"] and first[-1] < first[0]
    trained = load_trained(run)
    status, output, errors = dynamoe("export", tmp_path / "out", "--run-dir", run)
    assert (status, errors) == (0, "") and output == f"step 3 written to {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    back = from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(back.model(TOKENS).logits, trained.model(TOKENS).logits, atol=1e-5)
    assert {dtype for dtype in back.dtypes.values()} == {"F32"}


def test_the_first_loss_is_that_of_the_published_model(published: Path, experiment: Experiment, tmp_path: Path) -> None:
    still = dataclasses.replace(experiment, steps=1, optimizer=AdamW(learning_rate=1e-30, weight_decay=0.0))
    result = train(still, tmp_path / "run", init_from=published)
    model, nats, count = from_pretrained(published).model, 0.0, 0
    for batch in result.held_out.batches:
        logits = np.asarray(model(*map(jnp.asarray, batch.inputs)).logits, np.float64)
        for row, tokens, learned in zip(logits, batch.tokens, batch.learned, strict=True):
            for place in np.flatnonzero(learned[1:]):
                nats += math.log(np.exp(row[place]).sum()) - row[place][tokens[place + 1]]
                count += 1
    assert count == result.held_out.tokens
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.held_out.bytes, rel=1e-5)


def test_without_a_recipe_the_model_and_its_tokenizer_are_the_published_ones(
    dynamoe: Dynamoe, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--steps", "1", "--batch-size", "2", "--sequence-length", "8", "--evaluation-bytes", "100")
    status, output, errors = dynamoe("train", "--init-from", published, "--run-dir", "run", *options)
    assert (status, errors) == (0, "") and "HuggingFaceTokenizer" in (tmp_path / "run" / "config.json").read_text()
    assert load_trained(tmp_path / "run").experiment.model == published_model(published)[0]
    status, _, errors = dynamoe("train", "--init-from", published, "--run-dir", "run", *options)
    assert (status, errors) == (0, "")  # goes on where it ended


def test_another_model_is_refused_by_the_field_that_differs(
    published: Path, experiment: Experiment, tmp_path: Path
) -> None:
    for change, message in (
        ({"width": 24}, "model.config.width is 24; config describes 16"),
        ({"exits": Exits(after=(1,))}, ".*config describes a model without"),
    ):
        other = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **change))
        with pytest.raises(ValueError, match=rf"init_from .*: the recipe's model is another \({message}"):
            train(other, tmp_path / "run", init_from=published)
    assert not (tmp_path / "run").exists()
    free = dataclasses.replace(experiment.model, dtype="bfloat16", remat=True, loss_block=4)
    check_published(published, free)


def test_a_published_dense_model_becomes_a_mixture(tiny: Callable[..., Experiment], tmp_path: Path) -> None:
    llama = Path(__file__).parents[2] / "models" / "checkpoints" / "fixtures" / "llama"
    dense = from_pretrained(llama).model
    hidden = dense.config.feed_forwards[0].hidden
    mixture = MoE(experts=2, router=TopK(k=2), expert=SwiGLU(hidden=hidden), dispatcher=DenseDispatcher())
    model = dataclasses.replace(dense.config, ffn=mixture)
    experiment = tiny(model=model, tokenizer=Small(), steps=1, optimizer=AdamW(learning_rate=1e-30, weight_decay=0.0))
    run = train(experiment, tmp_path / "run", init_from=llama, upcycle=Copy()).path
    tokens = TOKENS % model.vocab
    np.testing.assert_allclose(load_trained(run).model(tokens).logits, dense(tokens).logits, atol=1e-4)


def test_another_tokenizer_is_refused(published: Path, experiment: Experiment, tmp_path: Path) -> None:
    other = dataclasses.replace(experiment, tokenizer=Small())
    with pytest.raises(ValueError, match=r"tokenizer is Small\(\); the model's own is HuggingFaceTokenizer"):
        train(other, tmp_path / "run", init_from=published)
    (published / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer is Bytes\(\), which no published model was trained on"):
        check_tokenizer(published, Bytes())
    check_tokenizer(published, Small())


def test_packed_weights_are_not_trained(experiment: Experiment) -> None:
    packed = Path(__file__).parents[2] / "models" / "checkpoints" / "fixtures" / "gpt_oss_packed"
    with pytest.raises(ValueError, match="its weights are packed, and have no gradient"):
        check_published(packed, experiment.model)


def test_a_run_that_began_from_nothing_has_no_published_form(experiment: Experiment, tmp_path: Path) -> None:
    run = train(dataclasses.replace(experiment, steps=1), tmp_path / "run").path
    with pytest.raises(ValueError, match="did not begin from a published model, there is no published in it"):
        published_again(load_trained(run))
