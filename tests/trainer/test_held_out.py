"""Held-out examples are the tokens that training and serving see."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.tokenizer import Tokenizer
from tests.trainer.demo_data import END_OF_TEXT, held_out, write_jsonl
from tests.trainer.runs import small_run, write_examples
from trainer.data import Fields
from trainer.errors import BadData
from trainer.held_out import Joint, joint_of, read_held_out
from trainer.session import gather, train

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


def test_a_judged_example_has_the_tokens_that_it_was_trained_with(tmp_path: Path) -> None:
    """Its file alone does not tell which separator training was told to put, or decided on by other examples."""
    path = write_examples(tmp_path / "data.jsonl", 8)
    config = small_run(tmp_path, data=path, held_out=path, separator=" fox ", num_steps=1)
    material = gather(config)
    end = material.base.model.eos_token_ids
    artifact = train(config, material=material).prefix.read_bytes()

    joint = joint_of(artifact)
    judged, _ = read_held_out(path, material.base.tokenizer, end, joint=joint)

    assert joint == Joint(" fox ")
    assert judged == list(material.held_out)
    assert judged != read_held_out(path, material.base.tokenizer, end)[0]


def test_of_a_file_that_is_no_artifact_nothing_is_known() -> None:
    assert joint_of(b"no artifact") == Joint()
