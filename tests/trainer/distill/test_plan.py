"""The lengths of a distillation: what does not fit is cut, or refused with the setting to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.engine.tokenizer import Tokenizer
from tests.tiny_model_dir import tiny_tokenizer
from tests.trainer.distill.material import words
from trainer.distill.config import DistillConfig
from trainer.distill.document import Document, read_document
from trainer.distill.framing import PlainFraming
from trainer.distill.plan import Plan, make_plan
from trainer.distill.seed_prompts import SeedPrompts
from trainer.errors import BadData, BadSetting

FORM = SeedPrompts(seeds={"a": ("the fox",)})


def plan(tmp_path: Path, num_words: int, limit: int | None, **settings: Any) -> Plan:
    path = tmp_path / "document.txt"
    path.write_text("dog. " * num_words)
    config = DistillConfig(document=path, output=tmp_path / "run", **settings)
    framing = PlainFraming(Tokenizer(tiny_tokenizer()), FORM)
    document: Document = read_document(path, words, config.min_chunk_tokens)
    return make_plan(config, document, framing, FORM, limit)


def test_a_model_with_many_positions_has_the_lengths_of_the_paper(tmp_path: Path) -> None:
    found = plan(tmp_path, 9000, 32768)

    assert (found.min_chunk, found.max_chunk) == (512, 4096)
    assert (found.max_message, found.max_answer) == (128, 256)
    assert found.num_virtual_tokens == 128
    assert plan(tmp_path, 9000, None).max_chunk == 4096


def test_in_a_small_model_chunk_message_and_answer_fit_together(tmp_path: Path) -> None:
    found = plan(tmp_path, 9000, 512)

    assert (found.max_message, found.max_answer) == (64, 128)
    assert found.min_chunk == found.max_chunk
    used = found.max_chunk + found.around + found.max_message + found.max_answer
    assert 512 - 32 <= used <= 512
    assert found.fits(512 - 128)
    assert not found.fits(512 - 127)


def test_a_short_document_has_a_prefix_of_a_quarter_of_it(tmp_path: Path) -> None:
    assert plan(tmp_path, 80, 512).num_virtual_tokens == 20


@pytest.mark.parametrize(
    ("num_words", "limit", "settings", "told"),
    [
        (50, 512, {"num_virtual_tokens": 50}, "num_virtual_tokens: 50, but the document has 50"),
        (900, 512, {"num_virtual_tokens": 400}, "no room for a prefix of 400"),
        (900, 512, {"max_answer_tokens": 490}, "no room for a part of the document"),
        (90, 512, {"num_virtual_tokens": 1}, "num_frozen_tokens: 1 of 1 leave nothing to train"),
        (90, 512, {"num_virtual_tokens": 4, "num_frozen_tokens": 4}, "leave nothing to train"),
    ],
)
def test_what_can_not_fit_is_refused(
    tmp_path: Path, num_words: int, limit: int, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadSetting, match=told):
        plan(tmp_path, num_words, limit, **settings)


def test_a_document_of_a_word_is_nothing_to_distil(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="1 tokens; expected a document of at least 4"):
        plan(tmp_path, 1, 512)


def test_chunks_that_end_before_they_begin_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="at most max_chunk_tokens"):
        plan(tmp_path, 90, 512, min_chunk_tokens=64, max_chunk_tokens=32)
