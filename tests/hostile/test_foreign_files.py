"""Hostile PEFT files: nothing but a named refusal ever escapes, and nothing is stored."""

from __future__ import annotations

import random
from dataclasses import replace

import safetensors
import torch

from prefix_store.backends.memory import MemoryBackend
from prefix_store.errors import PrefixRejected
from prefix_store.importers.incoming import Incoming
from prefix_store.importers.recognition import ImportOptions
from prefix_store.store import PrefixStore
from prefix_store.validation import Limits
from tests.hostile.test_artifacts import assert_fit_to_show, mutated
from tests.prefix_store.builders import TINY_BASE
from tests.prefix_store.importers.peft_files import peft_file, prompt

BASE = replace(TINY_BASE, hidden_size=24, num_attention_heads=6)
PREFIX = peft_file(prompt_embeddings=prompt(3, 32))
MULTITASK = peft_file(
    prompt_embeddings=prompt(3, 24),
    prefix_task_cols=torch.rand(2, 3, 2),
    prefix_task_rows=torch.rand(2, 2, 24),
)


def translated(store: PrefixStore, data: bytes, task_index: int | None) -> Incoming | None:
    """What an upload of `data` becomes; None for what is refused, or no PEFT file any more."""
    with store.begin_upload() as upload:
        upload.write(data)
        try:
            return upload.translate(ImportOptions(task_index=task_index))
        except PrefixRejected as refused:
            assert_fit_to_show(refused)  # type: ignore[arg-type]
            return None


def test_no_mutant_is_accepted_that_the_safetensors_library_refuses() -> None:
    store = PrefixStore(MemoryBackend(), BASE, Limits(16), host_cache_bytes=0)
    rng = random.Random(21)
    accepted = 0
    for number in range(6000):
        original, index = ((PREFIX, None), (MULTITASK, 1))[number % 2]
        data = mutated(original, rng)
        if translated(store, data, index) is not None:
            accepted += 1
            safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    assert accepted > 100  # else the mutations are too coarse to test anything
    assert store.tasks() == []
