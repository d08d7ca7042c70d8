"""Self-study: seeded conversations, each with the tokens that the teacher and the student see, and none made twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.trainer.distill.material import TEXT, words
from tests.trainer.runs import tiny_base
from trainer.base import FrozenBase
from trainer.distill.config import DistillConfig
from trainer.distill.conversations import Conversation, read_conversations
from trainer.distill.document import read_document
from trainer.distill.framing import framing_for
from trainer.distill.plan import Plan
from trainer.distill.seed_prompts import SeedPrompts
from trainer.distill.self_study import NO_MESSAGE, TOO_LONG, SelfStudy
from trainer.distill.studied_example import studied_examples
from trainer.engine_in_process import EngineInProcess
from trainer.errors import BadData, CannotResume

TOTAL = 10
ROUND = 4
FORM = SeedPrompts(
    seeds={"a": ("the", "quick"), "b": ("many",)},
    between=" over ",
    prompt="{message} dog",
    message_end=".",
)


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return tiny_base("llama")


def study(
    base: FrozenBase, tmp_path: Path, *, limit: int = 512, seed: int = 0, form: SeedPrompts = FORM
) -> SelfStudy:
    path = tmp_path / "document.txt"
    path.write_text(TEXT)
    config = DistillConfig(
        document=path,
        output=tmp_path / "run",
        num_conversations=TOTAL,
        max_num_seqs=ROUND // 2,
        message_temperature=1.0,
        answer_temperature=1.0,
        seed=seed,
    )
    engine = EngineInProcess(base.model, base.tokenizer, base=base.spec, max_num_seqs=ROUND // 2)
    plan = Plan(8, 16, 24, 5, 6, 12, limit)
    document = read_document(path, words, 16)
    return SelfStudy.of(engine, config, document, framing_for(base.tokenizer, form), form, plan)


def converse(
    made: SelfStudy, path: Path, should_stop: Callable[[], bool] = lambda: False
) -> list[Conversation] | None:
    return made.converse(path, lambda *_: None, should_stop)


def test_a_conversation_has_what_the_teacher_saw_and_what_is_served(
    base: FrozenBase, tmp_path: Path
) -> None:
    made = study(base, tmp_path)
    found = converse(made, tmp_path / "c.jsonl")

    assert found is not None
    assert [c.number for c in found] == list(range(TOTAL))
    assert [c.kind for c in found[:5]] == ["a", "b", "a", "b", "a"]
    for c in found:
        chunk = made.chunks[c.number]
        assert c.chunk == (chunk.start, chunk.start + chunk.num_pieces)
        assert c.prompt_token_ids == base.tokenizer.encode(f"{c.message} dog")
        text = base.tokenizer.encode(f"{chunk.text} over ")
        assert c.teacher_token_ids == text + c.prompt_token_ids
        assert 1 <= len(c.answer_token_ids) <= 6
        assert base.tokenizer.decode(c.answer_token_ids).startswith(c.answer)
    assert len({c.message for c in found}) > TOTAL // 2, "each has a seed of its own"


def test_the_file_holds_the_conversations_and_the_seed_decides_them(
    base: FrozenBase, tmp_path: Path
) -> None:
    found = converse(study(base, tmp_path), tmp_path / "c.jsonl")

    assert read_conversations(tmp_path / "c.jsonl", TOTAL, ROUND) == found
    assert converse(study(base, tmp_path), tmp_path / "again.jsonl") == found
    assert converse(study(base, tmp_path, seed=1), tmp_path / "other.jsonl") != found


def test_a_study_that_stopped_goes_on_and_makes_nothing_twice(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = converse(study(base, tmp_path), tmp_path / "whole.jsonl")
    path, answers = tmp_path / "parts.jsonl", iter([False, True])
    assert converse(study(base, tmp_path), path, lambda: next(answers)) is None
    kept = path.read_bytes()
    assert kept.count(b"\n") == ROUND
    with path.open("ab") as file:  # a round that a kill cut in two
        file.write(
            kept.splitlines()[0].replace(b'"number": 0', b'"number": 4') + b'\n{"number": 5, "ki'
        )

    resumed = study(base, tmp_path)
    rounds: list[Sequence[int]] = []
    make_round = SelfStudy._round

    def noted(self: SelfStudy, numbers: Sequence[int]) -> list[Conversation]:
        rounds.append(numbers)
        return make_round(self, numbers)

    monkeypatch.setattr(SelfStudy, "_round", noted)

    assert converse(resumed, path) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert rounds == [range(4, 8), range(8, 10)]


def test_what_does_not_fit_and_what_says_nothing_is_left_out(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = converse(study(base, tmp_path, limit=30), tmp_path / "short.jsonl")
    made = study(base, tmp_path)
    monkeypatch.setattr(type(made.framing), "message", lambda *_: "")
    silent = converse(made, tmp_path / "silent.jsonl")

    assert short is not None
    assert silent is not None
    assert {c.left_out for c in short} == {TOO_LONG}
    assert {c.left_out for c in silent} == {NO_MESSAGE}
    with pytest.raises(BadData, match="0 of 10 conversations can be used"):
        studied_examples(silent, 0.1, 0)


def test_the_same_message_is_never_both_trained_on_and_held_out() -> None:
    some = [Conversation(n, "a", (0, 1), f"m{n % 5}", "a", (n,), (9, n), (2,)) for n in range(40)]

    training, held_out = studied_examples(some, 0.2, seed=0)

    assert len(training) + len(held_out) == 40
    sides = [{some[e.conversation].message for e in side} for side in (training, held_out)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert all(e.prompt_token_ids == (e.conversation,) for e in (*training, *held_out))


@pytest.mark.parametrize("line", ["{}", "[]", "no json", '{"number": 3}'])
def test_a_file_of_something_else_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")

    with pytest.raises(CannotResume, match="line 1"):
        read_conversations(path, 1, 1)
