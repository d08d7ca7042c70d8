"""A stored prefix says where it comes from, proves itself, and is not written if no server would take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_store.artifact import decode, digest_of
from prefix_store.errors import IncompatiblePrefix
from prefix_store.spec import PrefixManifest
from tests.trainer.runs import random_examples, random_prefix, small_run, tiny_base
from trainer.base import load_base
from trainer.config import TrainConfig
from trainer.export import Export
from trainer.prefix_cache import KeyValues
from trainer.session import train


def manifest_of(path: Path) -> PrefixManifest:
    data = path.read_bytes()
    return decode(data, digest_of(data)).manifest


def test_the_artifact_says_how_it_was_trained_and_on_what(tmp_path: Path) -> None:
    config = small_run(
        tmp_path,
        num_virtual_tokens=None,
        encoder="mlp",
        init_text="many tasks",
        stop=("\n",),
        description="first words",
    )

    result = train(config)

    manifest = manifest_of(result.prefix)
    base = load_base(config.model, device="cpu")
    assert manifest.base_model.fingerprint == base.spec.fingerprint
    assert manifest.base_model.tokenizer_fingerprint == base.tokenizer.fingerprint()
    assert manifest.first_position == manifest.num_virtual_tokens
    assert manifest.description == "first words"
    assert manifest.generation.stop == ("\n",)
    assert manifest.generation.temperature == 0
    training: dict[str, Any] = manifest.training
    assert training["method"] == "mlp"
    assert training["mlp"] == {"embedding": 64, "hidden": 128}
    assert training["init_text"] == "many tasks"
    assert training["init_token_ids"] == list(base.tokenizer.encode("many tasks"))
    assert training["best"] == {"step": result.best_step, "held_out_loss": result.best_loss}
    assert training["data"]["num_training"] + training["data"]["num_held_out"] == 40
    assert manifest.probe is not None
    assert len(manifest.probe.top_ids) == 8


def export(**settings: Any) -> tuple[Export, KeyValues]:
    base = tiny_base()
    config = TrainConfig(data="d.jsonl", output="run", **settings)
    examples = random_examples(3)
    return Export.of(base, config, examples, examples), random_prefix(base, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_the_artifact_can_be_chosen(dtype: str) -> None:
    exporter, prefix = export(artifact_dtype=dtype)

    data = exporter.artifact(prefix, {})

    stored = decode(data, digest_of(data))
    expected = getattr(torch, dtype)
    assert {tensor.dtype for tensor in (*stored.keys, *stored.values)} == {expected}
    for one, other in zip(stored.keys, prefix.keys, strict=True):
        assert torch.equal(one, other.to(expected))


def test_values_that_no_server_computes_with_are_refused() -> None:
    exporter, prefix = export()
    prefix.keys[1][0, 0, 0] = 2e4

    with pytest.raises(IncompatiblePrefix, match="layer 1 key"):
        exporter.artifact(prefix, {})


def test_answers_are_given_room_for_the_longest_completion() -> None:
    exporter, _ = export()

    longest = max(len(e.completion_token_ids) for e in random_examples(3))
    assert longest < exporter.max_tokens <= longest + 16
