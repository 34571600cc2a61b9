"""`dynamoe generate`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console

from ...dynamic import EarlyExit
from ...models import DecoderLM
from ...models.generation import (
    AnyEngine,
    Categorical,
    EarlyExitEngine,
    Engine,
    Filter,
    Greedy,
    MinPTokens,
    Piece,
    RepetitionPenalty,
    Request,
    Sampler,
    SelfSpeculationEngine,
    Temperature,
    TextRequest,
    TopKTokens,
    TopPTokens,
    Usage,
    generate_text,
)
from ..data import Tokenizer
from .early_exit_option import Skipped, policy_of
from .model_option import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Continue prompts with a run's model or a published one, on one device, and show the text as it is drawn.

    Without arguments: the newest run in runs/ continues "def " (the default recipe is trained first if there is none).
    Ctrl-C ends it with what was drawn. The speed is told on standard error.
    """

    prompt: str = "def "
    """The text to continue."""
    prompts_file: Path | None = None
    """A file with a prompt in every line, instead; answers are shown in its order."""
    tokens: Annotated[int, tyro.conf.arg(aliases=("--max-tokens",))] = 400
    """How many tokens to draw at most for each prompt; a document's end stops earlier."""
    temperature: Annotated[float, tyro.conf.arg(aliases=("--sampling.temperature",))] = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: Annotated[int | None, tyro.conf.arg(aliases=("--sampling.top-k",))] = None
    """Draw among the k most likely tokens only. None: among all."""
    top_p: float | None = None
    """Draw among the fewest most likely tokens that reach this probability together. None: among all."""
    min_p: float | None = None
    """Draw among the tokens that are at least this many times as probable as the most probable one. None: among all."""
    repetition_penalty: float | None = None
    """Above 1: make tokens less likely that the text holds already. None: leave them."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; they are not shown."""
    early_exit: str | None = None
    """Let a token leave at the first exit that is at least so sure, 0 to 1; or "calibrated", by the guarantee that
    `dynamoe evaluate --sweep thresholds` left beside the run. None: all layers."""
    self_speculate: int | None = None
    """Draft so many tokens at a time with the model's first layers, and let the others verify them: the same text in
    distribution, and greedily the same. None: token by token."""
    draft_after: int | None = None
    """Layers that draft, one of the model's exits. None: up to the first."""
    draft_threshold: float = 0.05
    """Draft no token of which these layers are less sure than this, 0 to 1: the best one's probability less the second
    best's."""
    skipped_layers: Skipped = "propagate"
    """What becomes of the layers that a token skips: their keys and values come from its last state, or they run later
    when a token needs them, from kept states or again from the beginning."""
    seed: int = 0
    """The same seed draws the same text; the n-th prompt of a file has the seed + n - 1."""
    batch: int = 8
    """Prompts that are continued at a time."""
    context: int | None = None
    """Tokens of prompt and answer that the cache can hold. None: as many as are asked for."""

    def __post_init__(self):
        for name in ("tokens", "batch", "context"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if "" in self.stop:
            raise ValueError("stop holds an empty string; each must have a character at least")
        if self.early_exit is not None and self.self_speculate is not None:
            raise ValueError(f"early_exit is {self.early_exit} and self_speculate {self.self_speculate}; give one")
        if self.draft_after is not None and self.self_speculate is None:
            raise ValueError(f"draft_after is {self.draft_after} and self_speculate None; it says what drafts")
        sampler_of(self)

    def run(self, console: Console) -> int:
        prompts = [self.prompt] if self.prompts_file is None else prompts_in(self.prompts_file)
        trained = self.load(console)
        tokenizer, ends = trained.experiment.tokenizer, trained.stop_tokens
        requests = [
            text_request(tokenizer, prompt, tokens=self.tokens, seed=self.seed + place, stop=self.stop, ends=ends)
            for place, prompt in enumerate(prompts)
        ]
        sampler, policy = sampler_of(self), None
        if self.early_exit is not None:
            policy = policy_of(self.early_exit, self.skipped_layers, trained, sampler)
        elif self.self_speculate is not None:
            policy = Drafts(tokens=self.self_speculate, after=self.draft_after, threshold=self.draft_threshold)
        engine = engine_for(
            trained.model, tokenizer, requests, sampler=sampler, rows=self.batch, slots=self.context, policy=policy
        )
        status = 0
        try:
            for text in in_order(prompts, generate_text(engine, requests, tokenizer.decode)):
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            status = 130
        print(told(engine.usage) + _saved(engine), file=sys.stderr)
        return status


class Drafts(NamedTuple):
    """Self-speculation, as the options describe it."""

    tokens: int
    after: int | None
    threshold: float


def _saved(engine: AnyEngine) -> str:
    """What early exit or drafts did, behind the speed."""
    if isinstance(engine, EarlyExitEngine):
        return f"; {engine.depths.mean:.2f} layers a token"
    if isinstance(engine, SelfSpeculationEngine):
        of = engine.acceptance
        return f"; {of.rate:.0%} of {of.drafted:,} drafted tokens kept, {of.tokens_per_round:.2f} tokens a round"
    return ""


def sampler_of(options: Generate) -> Sampler:
    """The sampler that the options describe; the filters stand in transformers' order.

    Raises:
        ValueError: a value is out of bounds, by the option's name.
    """
    if not options.temperature >= 0:
        raise ValueError(f"temperature is {options.temperature}; it must be finite and at least 0")
    filters: list[Filter] = []
    if options.repetition_penalty is not None:
        filters.append(RepetitionPenalty(penalty=options.repetition_penalty))
    if options.temperature == 0:
        return Greedy(filters=tuple(filters))
    filters.append(Temperature(value=options.temperature))
    if options.top_k is not None:
        filters.append(TopKTokens(k=options.top_k))
    if options.top_p is not None:
        filters.append(TopPTokens(p=options.top_p))
    if options.min_p is not None:
        filters.append(MinPTokens(p=options.min_p))
    return Categorical(filters=tuple(filters))


def prompts_in(file: Path) -> list[str]:
    """The lines of a file.

    Raises:
        ValueError: it is not UTF-8, or has no line.
        OSError: it cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file {file} is not UTF-8: {error}") from None
    if not lines:
        raise ValueError(f"prompts_file {file} is empty; it must have a prompt in every line")
    return lines


def text_request(
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    seed: int,
    stop: tuple[str, ...] = (),
    ends: tuple[int, ...] = (),
    longest: int | None = None,
) -> TextRequest:
    """Continue a prompt at the beginning of a document, up to the document's end or one of the tokens `ends`; of a
    prompt with more than `longest` tokens the last ones.

    Raises:
        ValueError: the prompt has no token.
    """
    ids = tokenizer.encode(prompt).tolist()
    ids = ids if tokenizer.bos is None else [tokenizer.bos, *ids]
    ids = ids if longest is None else ids[-longest:]
    if not ids:
        raise ValueError(f"prompt is {prompt!r}; the tokenizer makes no token of it, and has none to begin with")
    ends = ends if tokenizer.eos is None else tuple({tokenizer.eos, *ends})
    return TextRequest(request=Request(prompt=tuple(ids), max_tokens=tokens, seed=seed, stop_tokens=ends), stop=stop)


def engine_for(
    model: DecoderLM,
    tokenizer: Tokenizer,
    requests: Sequence[TextRequest],
    *,
    sampler: Sampler,
    rows: int,
    slots: int | None = None,
    policy: EarlyExit | Drafts | None = None,
) -> AnyEngine:
    """An engine with no more rows and, with `slots` None, no more slots than the requests need."""
    needed = max(len(each.request.prompt) + each.request.max_tokens - 1 for each in requests)
    rows, slots = min(rows, len(requests)), needed if slots is None else slots
    if isinstance(policy, Drafts):
        return SelfSpeculationEngine(
            model,
            after=policy.after,
            tokens=policy.tokens,
            threshold=policy.threshold,
            rows=rows,
            slots=slots,
            sampler=sampler,
            vocab=tokenizer.vocab_size,
        )
    if policy is not None:
        return EarlyExitEngine(model, policy, rows=rows, slots=slots, sampler=sampler, vocab=tokenizer.vocab_size)
    return Engine(model, rows=rows, slots=slots, sampler=sampler, vocab=tokenizer.vocab_size)


def continuation(
    model: DecoderLM, tokenizer: Tokenizer, prompt: str, *, tokens: int, sampler: Sampler, seed: int
) -> Iterator[str]:
    """What follows a prompt, piece by piece, up to the document's end."""
    requests = [text_request(tokenizer, prompt, tokens=tokens, seed=seed)]
    engine = engine_for(model, tokenizer, requests, sampler=sampler, rows=1)
    return (piece.text for piece in generate_text(engine, requests, tokenizer.decode))


def in_order(prompts: Sequence[str], pieces: Iterator[Piece]) -> Iterator[str]:
    """Prompts and answers one after the other, a line after each answer; those that come early wait for their turn."""
    waiting, ended, turn = [""] * len(prompts), [False] * len(prompts), 0
    yield prompts[0]
    for piece in pieces:
        waiting[piece.request] += piece.text
        ended[piece.request] = piece.finish is not None
        while turn < len(prompts):
            text, waiting[turn] = waiting[turn], ""
            yield text
            if not ended[turn]:
                break
            turn += 1
            yield "\n" if turn == len(prompts) else f"\n{prompts[turn]}"


def told(usage: Usage) -> str:
    """The speed, in a line."""
    parts = [
        f"{tokens:,} tokens {what} in {seconds:.2f} s ({tokens / seconds:,.0f} a second)"
        for what, tokens, seconds in (
            ("read", usage.prompt_tokens, usage.prompt_seconds),
            ("drawn", usage.drawn_tokens, usage.drawn_seconds),
        )
        if tokens and seconds
    ]
    return "; ".join(parts) + "; compiling counts" if parts else "nothing was drawn"
