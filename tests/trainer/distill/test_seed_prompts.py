"""Seed prompts: ours, and a user's own in a file that says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.distill.seed_prompts import CHAT_SEEDS, PLAIN_SEEDS, SeedPrompts, load_seed_prompts
from trainer.errors import BadSetting


@pytest.mark.parametrize("chat", [True, False])
def test_there_are_five_kinds_for_chat_models_and_for_plain_ones(chat: bool) -> None:
    found = load_seed_prompts(None, chat=chat)

    assert set(found.seeds) == {"structure", "summary", "question", "use_case", "creative"}
    assert found.seeds == (CHAT_SEEDS if chat else PLAIN_SEEDS)


def test_kinds_take_turns() -> None:
    form = SeedPrompts(seeds={"a": ("1", "2"), "b": ("3",)})

    assert form.flat == [("a", "1"), ("b", "3"), ("a", "2"), ("b", "3")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "JSON"),
        ({"seeds": {}}, "seeds"),
        ({"seeds": {"a": []}}, "seeds.a"),
        ({"seeds": {"a": [""]}}, "seeds.a.0"),
        ({"seeds": {"a": ["x"]}, "sedes": 1}, "sedes"),
        ({"seeds": {"a": ["x"]}, "prompt": "no slot"}, r"expected \{message\} once"),
        ({"seeds": {"a": ["x"]}, "message_end": ""}, "message_end"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, content: Any, told: str) -> None:
    path = tmp_path / "seeds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(BadSetting, match=told):
        load_seed_prompts(path, chat=False)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"seeds\.json: No such file"):
        load_seed_prompts(tmp_path / "seeds.json", chat=True)
