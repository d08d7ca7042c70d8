"""Held-out examples are the tokens that training and serving see."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.tokenizer import Tokenizer
from tests.trainer.demo_data import END_OF_TEXT, held_out, write_jsonl
from trainer.data import Fields
from trainer.errors import BadData
from trainer.held_out import read_held_out

END = frozenset({END_OF_TEXT})


def test_a_file_gives_the_tokens_that_the_server_would_make(
    tmp_path: Path, demo_tokenizer: Tokenizer
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", "record-qa", 8)
    examples, notices = read_held_out(path, demo_tokenizer, END)
    assert examples == held_out(demo_tokenizer, "record-qa", 8)
    assert notices == []


def test_columns_are_found_by_their_names(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.csv"
    path.write_text("said,answer\nWhere?, Here.\n")
    [example], _ = read_held_out(path, demo_tokenizer, END, Fields("said", "answer"))
    assert example.prompt_token_ids == demo_tokenizer.encode("Where?")
    assert example.reference == " Here."


def test_a_bad_line_is_named_by_its_number(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(BadData, match="line 2: completion"):
        read_held_out(path, demo_tokenizer, END)
