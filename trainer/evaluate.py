"""Judges a prefix on held-out examples with the server's own engine, always beside what it has to beat.

Runs on the main thread; called by the command `prefixd evaluate`, by the end of a training run and by the sweep.
The baselines are the bare base model, and the base model with a text in front of each prompt (the text that the
prefix was initialised from, or a given one). Everything is decoded greedily under the same limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prefix_store.artifact import Prefix
from prefix_store.spec import GenerationDefaults
from server.engine.tokenizer import Tokenizer
from server.types import FinishReason, SamplingParams
from trainer.blind_spots import about_references
from trainer.encoding import EncodedExample, with_text
from trainer.engine_in_process import Completion, EngineInProcess, Progress, Prompt
from trainer.errors import BadData
from trainer.evaluation import (
    LOSS,
    NO_PREFIX,
    PERPLEXITY,
    PREFIX,
    TEXT_PROMPT,
    Condition,
    Evaluation,
)
from trainer.forgetting import GeneralText, forgetting_of
from trainer.likelihood import TextToScore, as_rows
from trainer.metrics import METRICS, Metric, Rows, loss, perplexity, require_known, totals
from trainer.standard_error import Score, Value, difference, score

DEFAULT_METRICS: Final = ("exact_match", "token_f1")
_SPARE_TOKENS: Final = 8  # beyond the longest right answer, so that going on after it shows
_LIKELIHOODS: Final[dict[str, Value]] = {LOSS: loss, PERPLEXITY: perplexity}


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """`text_prompt` None: the text that the prefix says it was initialised from, if it does and the model has room
    for it. `max_tokens` None: the longest reference and a few more, or what a prompt leaves of the model's positions.
    `general_text` None: no probe for forgetting, and the result says so.
    """

    metrics: tuple[str, ...] = DEFAULT_METRICS
    text_prompt: str | None = None
    max_tokens: int | None = None
    general_text: GeneralText | None = None

    def __post_init__(self) -> None:
        require_known(self.metrics)


def evaluate(
    engine: EngineInProcess,
    tokenizer: Tokenizer,
    artifact: bytes,
    examples: Sequence[EncodedExample],
    settings: EvaluationSettings,
    on_progress: Progress | None = None,
) -> Evaluation:
    """The whole judgement. Raises `PrefixRejected` for an artifact that a server would refuse, and `BadData`."""
    if not examples:
        raise BadData("no held-out examples: there is nothing to evaluate on")
    prefix = engine.prefix(artifact)
    text, note = _text_prompt(settings, prefix)
    if text is not None and settings.text_prompt is None:
        text, note = _with_room(text, engine, tokenizer, examples)
    conditions = _conditions(tokenizer, artifact, examples, text)
    max_tokens = settings.max_tokens or max_tokens_for(examples)
    sampling = greedy(max_tokens, prefix.manifest.generation)
    fitting = settings.max_tokens is None
    completions = _complete(engine, conditions, sampling, on_progress, fitting=fitting)
    metrics = [METRICS[name] for name in settings.metrics]
    rows = {
        name: _rows(metrics, completions[name], examples) | _nats(engine, prompts, examples)
        for name, prompts in conditions.items()
    }
    forgetting, why_not = forgetting_of(engine, tokenizer, artifact, prefix, settings.general_text)
    return Evaluation(
        digest=prefix.digest,
        num_virtual_tokens=prefix.manifest.num_virtual_tokens,
        model_id=engine.base.model_id,
        num_examples=len(examples),
        max_tokens=max_tokens,
        text_prompt=text,
        conditions={
            name: Condition(_scores(rows[name]), _num_cut(completions[name])) for name in rows
        },
        gains={name: _gains(rows[PREFIX], rows[name]) for name in rows if name != PREFIX},
        forgetting=forgetting,
        notes=(
            *note,
            *why_not,
            *about_references(settings.metrics, [e.reference for e in examples]),
        ),
    )


def generated_metrics(
    engine: EngineInProcess,
    artifact: bytes,
    examples: Sequence[EncodedExample],
    names: Sequence[str],
    max_tokens: int | None = None,
) -> dict[str, float]:
    """Metrics of the prefix alone, by name, for stopping early by one. Raises as `evaluate` does."""
    rows = _generated(engine, artifact, examples, names, max_tokens)
    return {name: METRICS[name].value(totals(found)) for name, found in rows.items()}


def generated_scores(
    engine: EngineInProcess,
    artifact: bytes,
    examples: Sequence[EncodedExample],
    names: Sequence[str],
) -> dict[str, Score]:
    """The same with their standard errors over the examples."""
    return _scores(_generated(engine, artifact, examples, names, None))


def _generated(
    engine: EngineInProcess,
    artifact: bytes,
    examples: Sequence[EncodedExample],
    names: Sequence[str],
    max_tokens: int | None,
) -> dict[str, Rows]:
    require_known(names)
    defaults = engine.prefix(artifact).manifest.generation
    sampling = greedy(max_tokens or max_tokens_for(examples), defaults)
    prompts = [Prompt(example.prompt_token_ids, artifact) for example in examples]
    completions = engine.generate(prompts, sampling, fitting=max_tokens is None)
    return _rows([METRICS[name] for name in names], completions, examples)


def greedy(max_tokens: int, defaults: GenerationDefaults) -> SamplingParams:
    """How everything is decoded: greedily, and with the stop strings that the artifact would be served with."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=defaults.stop)


def max_tokens_for(examples: Sequence[EncodedExample]) -> int:
    """Room for the longest reference and a few tokens more."""
    return max(len(example.completion_token_ids) for example in examples) + _SPARE_TOKENS


# ---- conditions ----------------------------------------------------------------------------------


def _text_prompt(
    settings: EvaluationSettings, prefix: Prefix
) -> tuple[str | None, tuple[str, ...]]:
    """The text of that baseline, or a note why there is none."""
    if settings.text_prompt is not None:
        return settings.text_prompt, ()
    recorded = prefix.manifest.training.get("init_text")
    # A long text is recorded cut short, with dots at its end: it would be another baseline.
    if isinstance(recorded, str) and recorded and not recorded.endswith("..."):
        return recorded, ()
    return None, (
        "no text-prompt baseline: the prefix names no whole text that it was initialised from; "
        "give one with --text-prompt",
    )


def _with_room(
    text: str, engine: EngineInProcess, tokenizer: Tokenizer, examples: Sequence[EncodedExample]
) -> tuple[str | None, tuple[str, ...]]:
    """A text may be longer than the prefix that began as it; where examples do not fit behind it, a note says so."""
    limit = engine.base.position_limit
    longest = max(
        len(with_text(tokenizer, text, example.prompt_token_ids))
        + len(example.completion_token_ids)
        for example in examples
    )
    if limit is None or longest <= limit:
        return text, ()
    return None, (
        f"no text-prompt baseline: with the text in front the longest example has {longest} tokens, "
        f"and the model {limit} positions",
    )


def _conditions(
    tokenizer: Tokenizer,
    artifact: bytes,
    examples: Sequence[EncodedExample],
    text: str | None,
) -> dict[str, list[Prompt]]:
    """What each condition continues, in the order of the table."""
    found = {
        PREFIX: [Prompt(example.prompt_token_ids, artifact) for example in examples],
        NO_PREFIX: [Prompt(example.prompt_token_ids) for example in examples],
    }
    if text is not None:
        found[TEXT_PROMPT] = [
            Prompt(with_text(tokenizer, text, example.prompt_token_ids)) for example in examples
        ]
    return found


def _complete(
    engine: EngineInProcess,
    conditions: dict[str, list[Prompt]],
    sampling: SamplingParams,
    on_progress: Progress | None,
    *,
    fitting: bool,
) -> dict[str, list[Completion]]:
    """All conditions in one batch, as a server would run them."""
    prompts = [prompt for chosen in conditions.values() for prompt in chosen]
    completions = iter(engine.generate(prompts, sampling, on_progress, fitting=fitting))
    return {name: [next(completions) for _ in chosen] for name, chosen in conditions.items()}


# ---- scores --------------------------------------------------------------------------------------


def _rows(
    metrics: Sequence[Metric],
    completions: Sequence[Completion],
    examples: Sequence[EncodedExample],
) -> dict[str, Rows]:
    texts = [completion.text for completion in completions]
    references = [example.reference for example in examples]
    return {metric.name: metric.rows(texts, references) for metric in metrics}


def _nats(
    engine: EngineInProcess, prompts: Sequence[Prompt], examples: Sequence[EncodedExample]
) -> dict[str, Rows]:
    """Teacher-forced loss of each reference, its end of text included."""
    texts = [
        TextToScore(prompt.token_ids, example.completion_token_ids)
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    rows = as_rows(engine.token_losses(prompts[0].artifact, texts))
    return dict.fromkeys(_LIKELIHOODS, rows)


def _scores(rows: dict[str, Rows]) -> dict[str, Score]:
    return {
        name: score(found, _value(name), yes_or_no=name in METRICS and METRICS[name].yes_or_no)
        for name, found in rows.items()
    }


def _gains(rows: dict[str, Rows], baseline: dict[str, Rows]) -> dict[str, Score]:
    return {name: difference(rows[name], baseline[name], _value(name)) for name in rows}


def _value(name: str) -> Value:
    return _LIKELIHOODS[name] if name in _LIKELIHOODS else METRICS[name].value


def _num_cut(completions: Sequence[Completion]) -> int:
    return sum(completion.finish_reason is FinishReason.LENGTH for completion in completions)
