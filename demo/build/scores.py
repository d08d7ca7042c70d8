"""Scores of completions, and what a literal must be before a task may ask for it.

Called by ``measure`` and ``export``, and by the tests. Everything is selected on validation sets; the test seed is used
here only, with held-out names.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from demo.build.corpus import documents
from demo.build.decoding import complete
from demo.build.tasks import TASKS, Example, Task, examples
from demo.build.tokenizer import encode

TEST_SEED: Final = 9_203
NUM_TEST: Final = 500
NUM_WRONG_TASK: Final = 100
MAX_NEW_TOKENS: Final = 64
NUM_SHOTS: Final = 3
SHOT_SEED: Final = 43
LITERAL_SEED: Final = 51
LITERAL_DOCUMENTS: Final = 5_000
LITERAL_MIN_COUNT: Final = 20


@dataclass(frozen=True, slots=True)
class Score:
    """Percentages. ``begins_right``: the answer is there, but the text may go on after it."""

    exact_match: float
    begins_right: float
    slot_recall: float


def says(output: str, value: str) -> bool:
    """Whether the value stands in the output as whole words."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", output) is not None


def percent(hits: int, count: int) -> float:
    return round(100.0 * hits / count, 1)


def score(outputs: Sequence[str], data: Sequence[Example]) -> Score:
    """Compare completions with answers; only the leading space is forgiven."""
    texts = [output.removeprefix(" ") for output in outputs]
    pairs = list(zip(texts, data, strict=True))
    slots = [says(text, slot) for text, item in pairs for slot in item.slots]
    return Score(
        exact_match=percent(sum(text == item.answer for text, item in pairs), len(data)),
        begins_right=percent(sum(text.startswith(item.answer) for text, item in pairs), len(data)),
        slot_recall=percent(sum(slots), len(slots)),
    )


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Example],
    prefix: torch.Tensor | None,
) -> Score:
    prompts = [item.prompt for item in data]
    return score(complete(model, tokenizer, prompts, prefix, MAX_NEW_TOKENS), data)


def with_shots(task: Task, data: Sequence[Example]) -> list[Example]:
    """The same items behind a few solved ones, the way a prompt would show the task."""
    shots = "".join(
        f"{shot.prompt} {shot.answer}\n" for shot in examples(task, SHOT_SEED, NUM_SHOTS, "train")
    )
    return [Example(shots + item.prompt, item.answer, item.slots) for item in data]


def first_lines(outputs: Sequence[str]) -> list[str]:
    """In the few-shot form a line end closes the answer."""
    return [output.split("\n")[0] for output in outputs]


def test_examples(task: Task) -> list[Example]:
    """Names that no training text holds."""
    return examples(task, TEST_SEED, NUM_TEST, "test")


def few_shot_score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, data: Sequence[Example]
) -> Score:
    """The base alone, with solved examples in the prompt."""
    shown = with_shots(task, data)
    prompts = [item.prompt for item in shown]
    return score(first_lines(complete(model, tokenizer, prompts, None, MAX_NEW_TOKENS)), shown)


def wrong_task_row(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prefix: torch.Tensor
) -> dict[str, float]:
    """Exact match of every task's items under one prefix."""
    return {
        asked: evaluate(model, tokenizer, test_examples(task)[:NUM_WRONG_TASK], prefix).exact_match
        for asked, task in TASKS.items()
    }


def rare_literals(tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, int]:
    """Tokens of the answers, values left out, that the corpus hardly holds.

    A tiny frozen model cannot be steered to a word that it has not learned.
    """
    wanted: set[int] = set()
    for item in examples(task, SHOT_SEED, 50, "train"):
        values = {token for slot in item.slots for token in encode(tokenizer, slot)}
        if item.answer not in item.slots:
            wanted |= set(encode(tokenizer, item.answer)) - values
    counts = dict.fromkeys(wanted, 0)
    for text in islice(documents(LITERAL_SEED), LITERAL_DOCUMENTS):
        for token in encode(tokenizer, text):
            if token in counts:
                counts[token] += 1
    return {
        str(tokenizer.decode([token])): count
        for token, count in counts.items()
        if count < LITERAL_MIN_COUNT
    }
