"""Held-out examples as tokens, and lines that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.tokenizer import Tokenizer
from tests.trainer.demo_data import END_OF_TEXT, held_out, write_jsonl
from trainer.errors import TrainerError
from trainer.held_out import read_held_out

END = frozenset({END_OF_TEXT})


def test_a_file_gives_the_tokens_that_the_server_would_make(
    tmp_path: Path, demo_tokenizer: Tokenizer
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", "record-qa", 8)
    assert read_held_out(path, demo_tokenizer, END) == held_out(demo_tokenizer, "record-qa", 8)


def test_a_border_inside_a_token_leaves_the_prompt_as_the_server_has_it(
    tmp_path: Path, demo_tokenizer: Tokenizer
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "the restau", "completion": "rant"}\n\n')
    [example] = read_held_out(path, demo_tokenizer, END)
    assert example.prompt_token_ids == demo_tokenizer.encode("the restau")
    assert example.completion_token_ids[-1] == END_OF_TEXT
    assert example.reference == "rant"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object with the texts"),
        ('{"prompt": "a"}', "line 2: expected an object with the texts"),
        ('{"prompt": "a", "completion": ""}', "neither of them empty"),
        ('{"prompt": 3, "completion": "b"}', "line 2: expected"),
    ],
)
def test_a_bad_line_is_named_by_its_number(
    tmp_path: Path, demo_tokenizer: Tokenizer, line: str, said: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(TrainerError, match=said):
        read_held_out(path, demo_tokenizer, END)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    with pytest.raises(TrainerError, match=r"nothing\.jsonl"):
        read_held_out(tmp_path / "nothing.jsonl", demo_tokenizer, END)
