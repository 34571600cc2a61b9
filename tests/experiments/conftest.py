"""A tiny experiment, its recipe file with classes of the user's own, and the command line as a process."""

import dataclasses
import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import pytest
import tokenizers
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from dynamoe.experiments.data import TextFiles
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW
from dynamoe.models import Attention, Decoder, Dense
from dynamoe.moe import DenseDispatcher, MoE, SwiGLU

TEXT = "\n\n".join(f"line {i}: {i * i} is the square of {i}" + " and more" * (i % 7) for i in range(200))

TINY_MODEL = Decoder(
    vocab=258,
    width=16,
    layers=2,
    attention=Attention(heads=2),
    ffn=MoE(experts=4, expert=SwiGLU(hidden=16), dispatcher=DenseDispatcher()),  # the fastest to compile
)

RECIPE = '''
"""A router of the user's own: the best of noisy logits, with a bias that follows the load and no optimizer sees."""
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from dynamoe.experiments.data import TextFiles
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import Muon
from dynamoe.models import Attention, Decoder
from dynamoe.moe import DenseDispatcher, MoE, Router, RouterState, Routing, SwiGLU
from flax import nnx


@dataclass(frozen=True, kw_only=True)
class Noisy(Router):
    noise: float = 1.0
    """Deviation of the noise."""

    @property
    def experts_per_token(self):
        return 1

    def build(self, *, width, experts, key):
        return NoisyRouter(self, width, experts, key)


class NoisyRouter(nnx.Module):
    def __init__(self, config, width, experts, key):
        self.config = config
        self.kernel = nnx.Param(jax.random.normal(key, (width, experts)) / width**0.5, axes=("embed", None))
        self.bias = RouterState(jnp.arange(experts, dtype=jnp.float32), axes=(None,))

    def __call__(self, x, context):
        logits = x.astype(jnp.float32) @ self.kernel[...] + self.bias[...][None]
        if context.training:
            logits = logits + self.config.noise * jax.random.normal(context.key, logits.shape)
        probs = jax.nn.softmax(logits, axis=-1)
        expert = probs.argmax(axis=-1).astype(jnp.int32)
        weight = jnp.take_along_axis(probs, expert[:, None], axis=1)[:, 0]
        share = jax.nn.one_hot(expert, probs.shape[1]).mean(axis=0)
        state = {"bias": self.bias[...] + 0.1 * (1 / probs.shape[1] - share)} if context.training else None
        return Routing(expert, weight, None, logits, probs), state


def recipe():
    return Experiment(
        model=Decoder(
            vocab=258,
            width=16,
            layers=2,
            attention=Attention(heads=2),
            ffn=MoE(experts=4, router=Noisy(), expert=SwiGLU(hidden=16), dispatcher=DenseDispatcher()),
        ),
        source=TextFiles(train=(str(Path(__file__).parent / "text.txt"),), separator="\\n\\n"),
        optimizer=Muon(learning_rate=1e-2),
        steps=30,
        batch_size=4,
        sequence_length=16,
        evaluate_every=10,
        evaluation_bytes=None,
        checkpoint_every=5,
        log_every=1,
    )
'''


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile a function once for all tests and processes; the caller may keep the cache in a folder of their own."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("xla"))
    # XLA's own caches write absolute paths into a cache entry's key.
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()  # an earlier test may have compiled without one
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of two hundred documents of unequal length."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def tiny(text: Path) -> Callable[..., Experiment]:
    """`tiny(steps=3)`: an experiment of a width of 16, two layers and 6 steps; options change single values."""
    base = Experiment(
        model=TINY_MODEL,
        source=TextFiles(train=(str(text),), separator="\n\n"),
        optimizer=AdamW(learning_rate=1e-2),
        steps=6,
        batch_size=4,
        sequence_length=16,
        evaluate_every=3,
        evaluation_bytes=None,
        checkpoint_every=2,
        log_every=1,
    )
    return lambda **options: dataclasses.replace(base, **options)


@pytest.fixture(scope="session")
def dense_model() -> Decoder:
    return dataclasses.replace(TINY_MODEL, ffn=Dense(hidden=32))


@pytest.fixture
def quiet() -> Iterator[Console]:
    """A console that nobody reads."""
    with open(os.devnull, "w") as nowhere:
        yield Console(file=nowhere)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file with a router of its own, beside its text; working directory and modules are as a process has."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "recipe", sys)  # so that whatever the test loads is taken away again
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "mine.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return folder / "mine.py"


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """`contents(folder)`: every file in it."""
    return lambda folder: {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


ABANDONED_READS = (
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)


@pytest.fixture
def abandoned_reads() -> Iterator[None]:
    """For tests of damaged checkpoints: Orbax abandons the reads beside the one that failed, and asyncio complains."""
    yield
    gc.collect()  # those complaints belong to this test, not to the next one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Filters of warnings are read before a test's fixtures are set up: so they are added here."""
    for item in items:
        if "abandoned_reads" in getattr(item, "fixturenames", ()):
            for complaint in ABANDONED_READS:
                item.add_marker(pytest.mark.filterwarnings(complaint))


@pytest.fixture
def dynamoe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`dynamoe("train", "mine.py")`: the command in this process. Returns its status, output and errors."""
    from dynamoe.experiments.cli import main

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        assert isinstance(exit.value.code, int)
        return exit.value.code, *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the command sets it, and the levels of two loggers
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    yield call
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A tiny OLMoE of random weights with a tokenizer of words: <unk>, <s>, </s>, <end>, w4, w5 to w31."""
    folder = tmp_path / "published"
    fixtures = Path(__file__).parents[1] / "models" / "checkpoints" / "fixtures"
    shutil.copytree(fixtures / "olmoe", folder, ignore=shutil.ignore_patterns("*.npz"))
    names = ["<unk>", "<s>", "</s>", "<end>", *(f"w{number}" for number in range(4, 32))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def recipe_text() -> str:
    """A recipe with a router of its own, which draws noise and keeps a state."""
    return RECIPE


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    saved, savefig = [], matplotlib.figure.Figure.savefig

    def remember(self: matplotlib.figure.Figure, *args: object, **kwargs: object) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", remember)
    return saved
