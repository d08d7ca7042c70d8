"""Runs whose data was the trouble: no relation to learn, other tokens than in serving, too little of it. Pure."""

from __future__ import annotations

import math
from typing import Final

from trainer.doctor.case import Case, nats, share
from trainer.doctor.finding import Failure, Finding, Severity
from trainer.records import Record

SHUT_OUT: Final = 0.9
"""Attention on the prefix in the median layer. Above it the prompt is unseen, whatever the data says about it."""

SETTLED: Final = 0.4
"""Steepness at the end, as in `Signals.bend`. Where the base makes nothing of the prompt, the form of the completions
is learned first and their relation to the prompt after it; until then no run can be told from a mismatch."""

LEARNS_BY_HEART: Final = 0.8  # training loss at last over that when the held-out loss was best
FALLS_BEHIND: Final = 0.1  # nats a token by which held-out loss stands above training loss
RISES: Final = 0.02  # nats a token, and share of the best, by which held-out loss rose since
FAR_APART: Final = 0.25
"""Training loss at last over held-out loss. On few examples the held-out loss may stay where it is instead of rising."""
LEVEL: Final = 0.2  # steepness of the held-out loss at the end, as in `Signals.bend`: more training gains nothing

TEMPLATE_CODES: Final = frozenset({"other_template", "begin_token_twice"})
"""Warnings of the encoding after which served prompts have other tokens than the ones that were trained on."""

EXACT_MATCH: Final = "exact_match"
FALLS_SHORT: Final = 0.25
"""Of the exact matches that the loss promises. Greedy decoding gets more right than sampling would, never a quarter."""
PROMISED: Final = 0.2  # share of exact matches below which the promise is too vague to judge by


def task_mismatch(case: Case) -> Finding | None:
    """Completions have nothing to do with their prompts, or the base can not make use of them."""
    if case.is_solved or not case.signals.is_long_enough or case.data.num_prompts == 1:
        return None
    attention = case.signals.attention
    if attention is not None and attention.median_last >= SHUT_OUT:
        return None
    evidence = _unrelated(case) or _no_better_than_bare(case)
    if evidence is None:
        return None
    return Finding(
        Failure.TASK_MISMATCH,
        Severity.ERROR,
        evidence,
        "See that each completion stands beside its own prompt (a sort or a join may have mixed them). If it does, the "
        "base can not yet do the task: train longer, or take a base that solves some of it with examples in the prompt.",
    )


def _unrelated(case: Case) -> str | None:
    """At no time was a completion more probable behind its own prompt, and the loss has settled."""
    gap, held = case.signals.prompt_gap_last, case.signals.held_last
    bend = case.signals.bend
    settled = bend is None or bend <= SETTLED
    if not case.prompts_never_mattered or gap is None or held is None or not settled:
        return None
    return (
        f"The held-out loss ends at {nats(held)} nats a token, and at {nats(held + gap)} with each completion behind "
        "another example's prompt: the completions do not depend on their prompts, neither before training nor after."
    )


def _no_better_than_bare(case: Case) -> str | None:
    """The prefix moved, and still the base alone is as good."""
    base, best, moved = case.data.base_loss, case.signals.best, case.signals.moved
    if base is None or best is None or moved is None or moved < 0.1 or best[1] < 0.98 * base:
        return None
    return (
        f"The held-out loss is {nats(best[1])} nats a token at best and {nats(base)} without a prefix, although the "
        f"prefix moved by {share(moved)} of its norm in the median layer."
    )


def template_mismatch(case: Case) -> Finding | None:
    """Serving and training see other tokens: the encoding said so, or generation falls far short of the loss."""
    told = [record for record in case.history.warnings if record.get("code") in TEMPLATE_CODES]
    short = _falls_short(case)
    if not told and short is None:
        return None
    texts = [str(record.get("message", record["code"])) for record in told]
    parts = [*([short] if short else []), *(f"The encoding warned: {text}." for text in texts)]
    return Finding(
        Failure.TEMPLATE_MISMATCH,
        Severity.ERROR if short else Severity.WARNING,
        " ".join(parts),
        "Give prompts in the form in which clients send them: `messages` for a chat model, plain text without the "
        "tokenizer's own begin token otherwise; and let each completion end as serving stops.",
    )


def _falls_short(case: Case) -> str | None:
    """exp(-loss x tokens) of the completions would be sampled exactly; greedy decoding finds at least a part of that."""
    record = _last_with_match(case)
    if record is None or case.data.completion_len is None:
        return None
    promised = math.exp(-float(record["loss"]) * case.data.completion_len)
    found = float(record[EXACT_MATCH]) / 100
    if promised < PROMISED or found >= FALLS_SHORT * promised:
        return None
    return (
        f"A held-out loss of {nats(record['loss'])} nats a token over {case.data.completion_len:.0f} tokens promises "
        f"some {share(promised)} of exact matches; generation, as the server does it, has {share(found)}."
    )


def _last_with_match(case: Case) -> Record | None:
    matching = [r for r in case.history.held_out if isinstance(r.get(EXACT_MATCH), int | float)]
    finite = [
        r for r in matching if isinstance(r["loss"], int | float) and math.isfinite(r["loss"])
    ]
    return finite[-1] if finite else None


def overfitting(case: Case) -> Finding | None:
    """Training examples are learned by heart, and the held-out loss rises or stays far above."""
    signals = case.signals
    best, held = signals.best, signals.held_last
    at_best, last = signals.train_at_best, signals.train_last
    if best is None or held is None or at_best is None or last is None:
        return None
    if not signals.is_long_enough or held - last.mean <= FALLS_BEHIND:
        return None
    rose = held - best[1] > max(RISES, RISES * best[1])
    by_heart = rose and last.mean < LEARNS_BY_HEART * at_best.mean
    level = signals.bend is not None and signals.bend <= LEVEL
    if not (by_heart or (level and last.mean < FAR_APART * held)):
        return None
    return Finding(
        Failure.OVERFITTING,
        Severity.WARNING,
        f"The training loss ends at {nats(last.mean)} nats a token and the held-out loss at {nats(held)}; when that "
        f"was best, at step {best[0]}, they were {nats(at_best.mean)} and {nats(best[1])}{_capacity(case)}.",
        "More examples help most. Otherwise end early (patience), take a shorter prefix, prefix dropout (0.1) or "
        "weight decay (0.01). The prefix of the best step is the one that is kept.",
    )


def _capacity(case: Case) -> str:
    tokens, parameters = case.data.num_completion_tokens, case.settings.num_parameters
    if tokens is None or parameters is None:
        examples = case.data.num_training
        return "" if examples is None else f", with {examples:,} training examples"
    return f"; {parameters:,} parameters learn from {tokens:,} completion tokens"
