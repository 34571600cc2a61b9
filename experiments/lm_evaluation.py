"""A model of ours in lm-evaluation-harness: its tasks, prompts and metrics on a published model or a run.

    from dynamoe.experiments.lm_evaluation import harness_model
    import lm_eval
    model = harness_model("path/to/OLMoE-1B-7B-0924")
    lm_eval.simple_evaluate(model=model, tasks=["arc_easy"], limit=100)

Gao et al., https://github.com/EleutherAI/lm-evaluation-harness (pip install lm_eval). Texts become tokens as its own
class for transformers makes them. Its "wikitext" counts perplexity per word, `dynamoe evaluate` per token: two figures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models import DecoderLM
from ..models.generation import Categorical, Greedy, Sampler, Temperature, TopKTokens, TopPTokens, generate_text
from .commands.generate import engine_for, text_request
from .data import Tokenizer
from .published import load_published
from .scoring import Pair, score
from .training.restore import Trained

ANSWER = 256
"""Tokens of an answer at most, where a task does not say."""
SAMPLING = ("temperature", "top_p", "top_k")


def harness_model(path: str | Path, *, tokenizer: Path | None = None, dtype: Any = "float32", rows: int = 8) -> Any:
    """A published model as lm-evaluation-harness takes it, `lm_eval.api.model.LM`.

    Args:
        path: as of `from_pretrained`.
        tokenizer: a tokenizer.json or a SentencePiece model. None: the one beside the weights.
        dtype: "float32" or "bfloat16".
        rows: texts that are read at a time.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: as `load_published`.
    """
    published = load_published(path, tokenizer=tokenizer, dtype=dtype)
    return harness_adapter(
        published.pretrained.model,
        published.tokenizer,
        longest=published.longest or 2048,
        ends=published.stop_tokens,
        rows=rows,
    )


def harness_run(trained: Trained, *, rows: int = 8) -> Any:
    """A run's model likewise; see `load_trained`."""
    experiment = trained.experiment
    return harness_adapter(
        trained.model, experiment.tokenizer, longest=experiment.sequence_length, ends=trained.stop_tokens, rows=rows
    )


def harness_adapter(
    model: DecoderLM, tokenizer: Tokenizer, *, longest: int, ends: tuple[int, ...] = (), rows: int = 8
) -> Any:
    """Any model with a tokenizer likewise.

    Args:
        model: stacked or unstacked.
        tokenizer: with a mark of a document's beginning or end: an empty context is that one.
        longest: tokens that the model reads at once.
        ends: ids that end an answer, besides the tokenizer's own mark.
        rows: texts at a time.
    """
    try:
        from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
        from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
            get_rolling_token_windows,
            make_disjoint_window,
        )
    except ImportError as error:
        raise ImportError(f"lm-evaluation-harness cannot be imported ({error}): pip install lm_eval") from error
    prefix = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    if prefix is None:
        raise ValueError(f"tokenizer is {tokenizer}, without a mark of a document's beginning or end; one is needed")

    class Adapter(TemplateLM):
        """What the harness asks, answered by `score` and `generate_text`."""

        @property
        def eot_token_id(self) -> int:
            return prefix if tokenizer.eos is None else tokenizer.eos

        @property
        def prefix_token_id(self) -> int:
            return prefix

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = tokenizer.encode(string).tolist()
            begins = tokenizer.bos is not None and add_special_tokens is not False and ids[:1] != [tokenizer.bos]
            return [prefix, *ids] if begins else ids

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            raise NotImplementedError("chat templates are not supported here; evaluate without apply_chat_template")

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = [Pair(context, continuation) for _, context, continuation in requests]
            found = score(model, pairs, longest=longest, rows=rows)
            return [(each.log_likelihood, each.greedy) for each in found]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for number, request in enumerate(requests):
                (text,) = request.args
                rolling = get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=prefix, max_seq_len=longest, context_len=1
                )
                for context, continuation in map(make_disjoint_window, rolling):
                    windows.append(Pair(context, continuation))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, found in zip(owners, score(model, windows, longest=longest, rows=rows), strict=True):
                totals[owner] += found.log_likelihood
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            answers: dict[int, str] = {}
            groups: dict[Sampler, list[int]] = {}
            options = [_Options(*request.args[1:]) for request in requests]
            for number, each in enumerate(options):
                groups.setdefault(each.sampler, []).append(number)
            for sampler, numbers in groups.items():
                asked = [self._request(requests[number].args[0], options[number], seed=number) for number in numbers]
                engine = engine_for(model, tokenizer, asked, sampler=sampler, rows=rows)
                for piece in generate_text(engine, asked, tokenizer.decode):
                    number = numbers[piece.request]
                    answers[number] = answers.get(number, "") + piece.text
            return [answers.get(number, "") for number in range(len(requests))]

        def _request(self, context: str, options: "_Options", *, seed: int) -> Any:
            room = longest - options.tokens
            if room < 1:
                raise ValueError(f"max_gen_toks is {options.tokens}; the model reads {longest} tokens, prompt included")
            return text_request(
                tokenizer, context, tokens=options.tokens, seed=seed, stop=options.stop, ends=ends, longest=room
            )

    return Adapter()


class _Options:
    """What a task says of its answers."""

    def __init__(self, given: dict[str, Any]):
        known = {"until", "max_gen_toks", "do_sample", *SAMPLING}
        if strange := sorted(set(given) - known):
            raise ValueError(f"generation argument {strange[0]!r} is {given[strange[0]]!r}; known are {sorted(known)}")
        until = given.get("until") or []
        self.stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        self.tokens = int(given.get("max_gen_toks", ANSWER))
        temperature = float(given.get("temperature", 0.0 if not given.get("do_sample") else 1.0))
        if temperature == 0 or not given.get("do_sample", temperature > 0):
            self.sampler: Sampler = Greedy()
            return
        filters: list[Any] = [Temperature(value=temperature)]
        if given.get("top_k"):
            filters.append(TopKTokens(k=int(given["top_k"])))
        if given.get("top_p", 1.0) < 1:
            filters.append(TopPTokens(p=float(given["top_p"])))
        self.sampler = Categorical(filters=tuple(filters))
