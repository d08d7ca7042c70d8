"""Hostile PEFT files: each gets the refusal that it is named for, and the store is as it was before."""

from __future__ import annotations

import pytest

from prefix_store.backends.memory import MemoryBackend
from prefix_store.importers.soft_prompt import SoftPrompt
from tests.hostile import foreign
from tests.hostile.foreign import FOREIGN
from tests.hostile.judge import faults_of_refusal, taken
from tests.hostile.originals import BASE, Original, originals


@pytest.mark.parametrize("name", FOREIGN)
def test_a_hostile_peft_file_is_refused_and_leaves_no_trace(name: str) -> None:
    file = FOREIGN[name]
    backend = MemoryBackend()
    with pytest.raises(file.error) as caught:
        taken(Original(name, file.data, BASE, file.options), file.data, backend)
    assert type(caught.value) is file.error
    assert faults_of_refusal(caught.value) == []
    assert (backend.blobs, backend.logs) == ({}, {})


@pytest.mark.parametrize("original", originals(), ids=lambda original: original.name)
def test_the_valid_files_are_taken(original: Original) -> None:
    found = taken(original, original.data, MemoryBackend())
    assert isinstance(found, SoftPrompt) == (original.name in ("peft-soft-f16", "peft-multitask"))


def test_the_files_differ_from_valid_ones_in_what_they_are_named_for() -> None:
    for file in (foreign.rows(foreign.ROWS), foreign.rows(foreign.SOFT), foreign.multitask()):
        assert taken(Original("valid", file.data, BASE, file.options), file.data, MemoryBackend())
