"""A whole distillation: a prefix that comes near the document, and the same one however often it was interrupted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from prefix_store.artifact import decode, digest_of
from tests.trainer.distill.material import (
    TEXT,
    chat_tokenizer,
    demo_distillation,
    tiny_distillation,
)
from tests.trainer.runs import Recorder
from trainer.distill import distillation
from trainer.distill.comparison_report import CHUNK, COMPARISON, DOCUMENT, NO_DOCUMENT, PREFIX
from trainer.distill.distillation import DistillResult, distill, resume
from trainer.errors import BadData, BadSetting, CannotResume, RunExists
from trainer.session import Attachments


def counting_stages(stages: list[str]) -> distillation.OnStage:
    return lambda name, done, total: stages.append(f"{name} {done}/{total}")


@pytest.fixture(scope="module")
def of_a_record(tmp_path_factory: pytest.TempPathFactory) -> tuple[DistillResult, Recorder]:
    """One run on the demo's base, which the tests below look at."""
    recorder = Recorder()
    result = distill(demo_distillation(tmp_path_factory.mktemp("record")), Attachments((recorder,)))
    return result, recorder


def test_the_prefix_comes_far_nearer_to_the_teacher_than_its_start_and_than_no_prefix(
    of_a_record: tuple[DistillResult, Recorder],
) -> None:
    result, recorder = of_a_record
    [begin] = recorder.of("begin")
    first = float(recorder.of("held_out")[0]["loss"])

    assert result.training is not None
    assert result.comparison is not None
    assert result.training.best_loss < 0.25 * float(begin["base_loss"])
    assert result.training.best_loss < 0.5 * first
    conditions = result.comparison.conditions
    assert conditions[PREFIX].divergence < 0.25 * conditions[NO_DOCUMENT].divergence
    assert conditions[PREFIX].same_token > conditions[NO_DOCUMENT].same_token
    assert conditions[PREFIX].token_f1.value > conditions[NO_DOCUMENT].token_f1.value


def test_the_document_in_the_prompt_is_the_teacher_where_it_fits_as_a_whole(
    of_a_record: tuple[DistillResult, Recorder],
) -> None:
    found = of_a_record[0].comparison

    assert found is not None
    assert set(found.conditions) == {PREFIX, DOCUMENT, NO_DOCUMENT}
    document = found.conditions[DOCUMENT]
    assert document.divergence < 1e-5
    assert document.same_token == 100
    assert document.same_answer.value == 100
    assert found.document_fits


def test_the_prefix_costs_its_length_once_and_the_document_its_own_each_time(
    of_a_record: tuple[DistillResult, Recorder],
) -> None:
    result = of_a_record[0]
    assert result.comparison is not None
    conditions = result.comparison.conditions

    bytes_a_token = 2 * 6 * 3 * 32 * 4  # keys and values, layers, heads, head dimension, float32
    assert conditions[PREFIX].num_kv_tokens == 12
    assert conditions[PREFIX].kv_bytes == 12 * bytes_a_token
    assert conditions[PREFIX].kv_shared
    assert conditions[DOCUMENT].num_kv_tokens > 30
    assert not conditions[DOCUMENT].kv_shared
    assert conditions[NO_DOCUMENT].kv_bytes == 0
    assert all(c.first_token_seconds > 0 for c in conditions.values())
    stored = json.loads((result.folder / COMPARISON).read_text())
    assert stored["conditions"]["prefix"]["divergence"] == conditions[PREFIX].divergence


def test_the_artifact_says_what_it_was_distilled_from(
    of_a_record: tuple[DistillResult, Recorder],
) -> None:
    training = of_a_record[0].training
    assert training is not None
    data = training.prefix.read_bytes()
    manifest = decode(data, digest_of(data)).manifest

    assert manifest.training["init"] == "document"
    assert "distillation" in str(manifest.training["objective"])
    document: Any = manifest.training["document"]
    assert document["digest"].startswith("sha256:")
    assert manifest.generation.stop == (".",)


# ---- interrupted and resumed -----------------------------------------------------------------------


def test_interrupted_in_each_stage_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = distill(tiny_distillation(tmp_path, output=tmp_path / "whole"))
    config = tiny_distillation(tmp_path, output=tmp_path / "parts")
    recorder = Recorder()

    def after(count: int) -> Attachments:
        asked = itertools.count(1)
        return Attachments((recorder,), should_stop=lambda: next(asked) > count)

    studying = distill(config, after(2))
    assert studying.training is None
    teaching = resume(config.output, after(1))
    assert teaching.training is None
    training = resume(
        config.output, Attachments((recorder,), should_stop=lambda: len(recorder.of("step")) >= 2)
    )
    stages: list[str] = []
    last = resume(config.output, Attachments((recorder,)), counting_stages(stages))

    assert training.comparison is None
    assert training.training is not None
    assert training.training.reason == "interrupted"
    assert stages[0] == "conversations 20/20", "none is generated again"
    for name in (
        "self_study/conversations.jsonl",
        "teacher/00000.safetensors",
        "prefix.safetensors",
    ):
        assert (config.output / name).read_bytes() == (whole.folder / name).read_bytes()
    assert last.comparison is not None
    assert whole.comparison is not None
    one, other = whole.comparison.conditions[PREFIX], last.comparison.conditions[PREFIX]
    assert one.divergence == other.divergence
    assert one.same_answer == other.same_answer


def test_a_run_does_not_go_on_with_another_document(tmp_path: Path) -> None:
    config = tiny_distillation(tmp_path)
    distill(config, Attachments(should_stop=lambda: True))
    (tmp_path / "document.txt").write_text(TEXT.replace("fox", "dog"))

    with pytest.raises(CannotResume, match="document"):
        resume(config.output)


def test_a_run_does_not_begin_in_a_folder_that_holds_another(tmp_path: Path) -> None:
    config = tiny_distillation(tmp_path)
    distill(config, Attachments(should_stop=lambda: True))

    with pytest.raises(RunExists, match="prefixd distill --resume"):
        distill(config)


def test_a_folder_without_a_distillation_can_not_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CannotResume, match="no distillation"):
        resume(tmp_path)


# ---- documents of any length -----------------------------------------------------------------------


def test_of_a_document_longer_than_the_context_the_teacher_sees_parts_and_the_log_says_so(
    tmp_path: Path,
) -> None:
    config = tiny_distillation(tmp_path)
    config.document.write_text(TEXT * 30)
    recorder = Recorder()

    result = distill(config, Attachments((recorder,)))

    assert result.comparison is not None
    assert not result.comparison.document_fits
    assert set(result.comparison.conditions) == {PREFIX, CHUNK, NO_DOCUMENT}
    assert "more tokens than the model has positions" in result.comparison.as_result_table().note
    [told] = [r["message"] for r in recorder.of("warning") if r["code"] == "document_in_parts"]
    assert "the teacher sees 16 to 40 of them" in told


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("", BadData, "the document is empty"),
        ("fox", BadData, "expected a document of at least 4"),
        ("the quick brown fox", BadSetting, "num_virtual_tokens: 8"),
    ],
)
def test_a_document_that_is_too_short_is_refused_before_anything_is_written(
    tmp_path: Path, text: str, kind: type[Exception], told: str
) -> None:
    config = tiny_distillation(tmp_path)
    config.document.write_text(text)

    with pytest.raises(kind, match=told):
        distill(config)
    assert not config.output.exists()


def test_a_model_with_a_chat_template_talks_in_it(tmp_path: Path) -> None:
    config = tiny_distillation(tmp_path, min_chunk_tokens=16, max_message_tokens=8)
    chat_tokenizer()._tokenizer.save_pretrained(str(config.model))

    result = distill(config)

    assert result.comparison is not None
    lines = (config.output / "self_study" / "conversations.jsonl").read_text().splitlines()
    used = [c for c in map(json.loads, lines) if not c["left_out"]]
    tokenizer = chat_tokenizer()
    assert used
    for found in used:
        turns = [{"role": "user", "content": found["message"]}]
        served = tokenizer.encode_chat(turns, add_generation_prompt=True)
        assert tuple(found["prompt_token_ids"]) == served
        assert "system" in tokenizer.decode(found["teacher_token_ids"][:12])
