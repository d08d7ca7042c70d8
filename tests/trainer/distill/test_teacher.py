"""The teacher's logits on disk: those that a fresh pass gives, computed once, and never another run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.runs import random_examples, tiny_base
from trainer.base import FrozenBase
from trainer.distill import teacher as module
from trainer.distill.conversations import Conversation
from trainer.distill.teacher import TopK, teacher_of, top_k_logits


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return tiny_base("qwen3")


def conversations(count: int = 7) -> list[Conversation]:
    made = [
        Conversation(
            n,
            "a",
            (0, 1),
            "m",
            "a",
            e.prompt_token_ids,
            (9, 8, *e.prompt_token_ids),
            e.completion_token_ids,
        )
        for n, e in enumerate(random_examples(count, seed=5))
    ]
    made[2] = replace(made[2], left_out="too long")
    return made


def cached(
    base: FrozenBase, folder: Path, some: list[Conversation], top_k: int = 6
) -> dict[int, TopK]:
    found = teacher_of(
        base,
        some,
        folder,
        top_k=top_k,
        rows=3,
        on_progress=lambda *_: None,
        should_stop=lambda: False,
    )
    assert found is not None
    return found


def equal(one: dict[int, TopK], other: dict[int, TopK]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n].token_ids, other[n].token_ids)
        and torch.equal(one[n].log_probs, other[n].log_probs)
        for n in one
    )


def test_the_cache_is_what_a_fresh_pass_over_each_conversation_alone_gives(
    base: FrozenBase, tmp_path: Path
) -> None:
    some = conversations()
    cached(base, tmp_path / "teacher", some)
    found = cached(base, tmp_path / "teacher", some)

    assert set(found) == {0, 1, 3, 4, 5, 6}, "what was left out has no logits"
    for number, top in found.items():
        [alone] = top_k_logits(base, [some[number]], 6, 1).values()
        assert torch.equal(top.token_ids, alone.token_ids)
        torch.testing.assert_close(top.log_probs, alone.log_probs, rtol=0, atol=1e-5)
        ids = torch.tensor([(*some[number].teacher_token_ids, *some[number].answer_token_ids)])
        with torch.no_grad():
            logits = base.module(input_ids=ids).logits[0].float().log_softmax(-1)
        count = len(some[number].answer_token_ids)
        expected = logits[-count - 1 : -1].gather(-1, top.token_ids)
        torch.testing.assert_close(top.log_probs, expected, rtol=0, atol=1e-5)


def test_it_is_computed_once(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = conversations()
    first = cached(base, tmp_path / "teacher", some)
    monkeypatch.setattr(module, "top_k_logits", lambda *_: pytest.fail("computed again"))

    assert equal(cached(base, tmp_path / "teacher", some), first)


def test_it_goes_on_behind_the_shards_that_are_there(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 2)
    some, answers = conversations(), iter([False, True])
    stopped = teacher_of(
        base,
        some,
        tmp_path / "parts",
        top_k=6,
        rows=3,
        on_progress=lambda *_: None,
        should_stop=lambda: next(answers),
    )

    assert stopped is None
    assert len(list((tmp_path / "parts").iterdir())) == 1
    assert equal(cached(base, tmp_path / "parts", some), cached(base, tmp_path / "whole", some))


@pytest.mark.parametrize("change", ["tokens", "top_k", "base", "damage"])
def test_logits_of_another_run_are_not_taken(base: FrozenBase, tmp_path: Path, change: str) -> None:
    some = conversations()
    cached(base, tmp_path / "teacher", some)
    other, top_k = base, 6
    if change == "tokens":
        some[0] = replace(some[0], answer_token_ids=(3, 2))
    elif change == "top_k":
        top_k = 7
    elif change == "base":
        other = replace(base, spec=replace(base.spec, fingerprint="sha256:other"))
    else:
        shard = tmp_path / "teacher" / "00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-40])

    again = cached(other, tmp_path / "teacher", some, top_k)

    assert equal(again, cached(other, tmp_path / "fresh", some, top_k))


def test_a_k_as_large_as_the_vocabulary_leaves_a_rest(base: FrozenBase) -> None:
    [top] = top_k_logits(base, conversations()[:1], 10_000, 1).values()

    assert top.token_ids.shape[-1] == base.spec.vocab_size - 1
