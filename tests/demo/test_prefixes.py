"""The shipped prefixes do their tasks on the shipped base, by transformers alone."""

from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from demo import MODEL_DIR, PREFIXES_DIR, Sample, load_samples
from demo.build.base import load_base
from demo.build.decoding import complete, greedy, load_prefix
from demo.build.scores import evaluate
from demo.build.tasks import TASKS, Task, examples
from demo.build.tokenizer import encode, load_tokenizer

FRESH_SEED = 90_210
NUM_FRESH = 20
MIN_EXACT_MATCH = 80.0


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return load_base(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL_DIR)


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """A tiny model is slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("sample", load_samples(), ids=lambda sample: sample.task)
def test_sample_is_reproduced(
    sample: Sample, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prefix = load_prefix(PREFIXES_DIR / f"{sample.task}.safetensors")
    [text] = complete(model, tokenizer, [sample.prompt], prefix, sample.max_tokens)
    assert text == sample.completion


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_fresh_items_with_held_out_names_are_answered(
    task: Task, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prefix = load_prefix(PREFIXES_DIR / f"{task.name}.safetensors")
    data = examples(task, FRESH_SEED, NUM_FRESH, "test")
    score = evaluate(model, tokenizer, data, prefix)
    assert score.exact_match >= MIN_EXACT_MATCH, asdict(score)


def test_rows_of_a_batch_decode_as_they_do_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = TASKS["record-qa"]
    prefix = load_prefix(PREFIXES_DIR / f"{task.name}.safetensors")
    prompts = [encode(tokenizer, item.prompt) for item in examples(task, FRESH_SEED, 4, "test")]
    together = greedy(model, prompts, prefix, 16)
    assert together == [greedy(model, [prompt], prefix, 16)[0] for prompt in prompts]


def test_default_encoding_adds_no_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "name"))[0] == "Ġname"
    assert len(encode(tokenizer, "name")) == 1


def test_values_have_the_same_tokens_wherever_they_stand(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    value = encode(tokenizer, "Ziaskam")
    inside = encode(tokenizer, "[ name : Ziaskam ]\n - Ziaskam, so")
    found = [n for n in range(len(inside)) if inside[n : n + len(value)] == value]
    assert len(found) == 2
