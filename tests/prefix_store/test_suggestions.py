"""Suggestions are found among many names, and compared with few."""

from __future__ import annotations

import pytest

from prefix_store.suggestions import MAX_CANDIDATES, candidates, similar_names

MANY = sorted(
    f"{kind}-{number:04d}" for kind in ("clerk", "poet", "tutor") for number in range(3000)
)


@pytest.mark.parametrize("name", ["poet-0500", "poet", "e", "zzz", "", "a", "clerk-0000-x", "-"])
def test_however_many_names_there_are_few_are_compared(name: str) -> None:
    assert len(candidates(name, MANY)) <= MAX_CANDIDATES


@pytest.mark.parametrize(
    ("name", "meant"),
    [("poet-050", "poet-0500"), ("poet-05000", "poet-0500"), ("my-poet-0500", "poet-0500")],
)
def test_a_close_name_is_found_among_many(name: str, meant: str) -> None:
    assert meant in similar_names(name, MANY, 5)


def test_with_few_names_all_are_compared() -> None:
    names = ["clerk", "poet", "tutor"]

    assert candidates("xoet", names) == names
    assert similar_names("xoet", names, 5) == ["poet"]
