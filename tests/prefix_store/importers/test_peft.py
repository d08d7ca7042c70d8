"""Bare PEFT files: what they are taken for, and each refusal with what was expected and what came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prefix_store.artifact import Prefix, decode, digest_of
from prefix_store.errors import (
    AmbiguousFormat,
    ImportRefused,
    IncompatiblePrefix,
    MalformedArtifact,
)
from prefix_store.importers.incoming import recognise
from prefix_store.importers.recognition import ImportOptions
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.spec import BaseSpec, KVLayout, LayerLayout
from prefix_store.validation import Limits, accept
from tests.prefix_store.builders import TINY_BASE, make_artifact
from tests.prefix_store.importers.peft_files import peft_file, prompt

# 2 layers, 2 kv heads of 4: a prefix row has 2 * 2 * 2 * 4 = 32 elements.
BASE = replace(TINY_BASE, hidden_size=24, num_attention_heads=6)
LIMITS = Limits(max_num_virtual_tokens=16)


def imported(data: bytes, base: BaseSpec = BASE, **options: Any) -> tuple[bytes | SoftPrompt, str]:
    found = recognise(
        bytearray(data),
        len(data),
        base,
        LIMITS,
        ImportOptions(**options),
    )
    assert found is not None
    return found.read(bytearray(data), digest_of(data)), found.recognition.recognised


def prefix_of(data: bytes, base: BaseSpec = BASE, **options: Any) -> Prefix:
    artifact, _ = imported(data, base, **options)
    assert isinstance(artifact, bytes)
    return accept(bytearray(artifact), digest_of(artifact), base, LIMITS)


def refusal(data: bytes, base: BaseSpec = BASE, **options: Any) -> str:
    with pytest.raises(ImportRefused) as caught:
        imported(data, base, **options)
    return str(caught.value)


def test_rows_become_keys_and_values_of_each_layer_in_turn() -> None:
    rows = prompt(3, 32)

    prefix = prefix_of(peft_file(prompt_embeddings=rows))

    slots = rows.view(3, 4, 2, 4)
    assert torch.equal(prefix.keys[0], slots[:, 0])
    assert torch.equal(prefix.values[0], slots[:, 1])
    assert torch.equal(prefix.keys[1], slots[:, 2])
    assert torch.equal(prefix.values[1], slots[:, 3])
    assert prefix.manifest.first_position == 3


def test_the_manifest_says_where_the_prefix_came_from_and_what_is_not_known() -> None:
    data = peft_file(prompt_embeddings=prompt(3, 32))

    source = prefix_of(data).manifest.source

    assert source["format"] == "peft"
    assert source["sha256"] == digest_of(data)
    assert "prompt_embeddings [3, 32] float32" in str(source["recognised"])
    assert "position 3" in str(source["assumed"])
    assert "base model" in str(source["unverified"])
    assert prefix_of(data).manifest.base_model.fingerprint is None


def test_the_same_file_gives_the_same_artifact() -> None:
    data = peft_file(prompt_embeddings=prompt(3, 32))
    assert imported(data) == imported(data)


def test_a_file_that_was_cast_keeps_its_dtype() -> None:
    data = peft_file(prompt_embeddings=prompt(3, 32, dtype="bfloat16"))
    assert prefix_of(data).keys[0].dtype == torch.bfloat16


def test_rows_as_wide_as_an_embedding_are_a_soft_prompt() -> None:
    rows = prompt(5, 24)

    soft, recognised = imported(peft_file(prompt_embeddings=rows))

    assert isinstance(soft, SoftPrompt)
    assert torch.equal(soft.embeddings, rows)
    assert "soft prompt" in recognised


def test_a_task_of_a_multitask_file_is_its_rows_times_its_low_rank_factor() -> None:
    rows, cols, right = prompt(5, 24), torch.rand(3, 5, 2), torch.rand(3, 2, 24)
    data = peft_file(prompt_embeddings=rows, prefix_task_cols=cols, prefix_task_rows=right)

    soft, recognised = imported(data, task_index=2)

    assert isinstance(soft, SoftPrompt)
    assert torch.equal(soft.embeddings, rows * (cols[2] @ right[2]))
    assert soft.provenance.details["task_index"] == 2
    assert "task 2 of 3" in recognised


@pytest.mark.parametrize(("index", "came"), [(None, "got none"), (3, "got 3")])
def test_a_multitask_file_needs_a_task_that_it_has(index: int | None, came: str) -> None:
    data = peft_file(
        prompt_embeddings=prompt(5, 24),
        prefix_task_cols=torch.rand(3, 5, 2),
        prefix_task_rows=torch.rand(3, 2, 24),
    )
    assert came in refusal(data, task_index=index)
    assert "expected task_index 0 to 2" in refusal(data, task_index=index)


def test_factors_of_a_multitask_file_must_fit_its_rows() -> None:
    data = peft_file(
        prompt_embeddings=prompt(5, 24),
        prefix_task_cols=torch.rand(3, 4, 2),
        prefix_task_rows=torch.rand(3, 2, 24),
    )
    assert "expected [3, 5, 2] and [3, 2, 24]" in refusal(data, task_index=0)


def test_layers_of_different_shapes_read_the_first_heads_and_elements_of_the_widest() -> None:
    """As PEFT provisions Gemma 4: the heads of the layer with the widest head."""
    layers = (LayerLayout(2, 8, 8), LayerLayout(2, 4, 4))
    base = replace(BASE, layout=KVLayout(layers, "float32"))
    rows = prompt(3, 64)

    prefix = prefix_of(peft_file(prompt_embeddings=rows), base)

    slots = rows.view(3, 4, 2, 8)
    assert torch.equal(prefix.keys[0], slots[:, 0])
    assert torch.equal(prefix.values[1], slots[:, 3, :, :4])
    assert "widest" in str(prefix.manifest.source["assumed"])


def test_a_width_that_fits_twice_is_refused_until_the_caller_says_which() -> None:
    base = replace(BASE, hidden_size=32)
    data = peft_file(prompt_embeddings=prompt(3, 32))

    with pytest.raises(AmbiguousFormat, match="peft_type, one of PREFIX_TUNING"):
        imported(data, base)

    assert isinstance(imported(data, base, peft_type="CARTRIDGE")[0], bytes)
    assert isinstance(imported(data, base, peft_type="P_TUNING")[0], SoftPrompt)


def test_heads_from_before_the_gqa_fix_are_named() -> None:
    message = refusal(peft_file(prompt_embeddings=prompt(3, 96)))  # 6 heads instead of 2
    assert "expected 32 (2 x 2 layers x 2 kv heads x 4)" in message
    assert "one head per attention head (6)" in message
    assert "the base model has 2 key/value heads" in message


def test_another_number_of_layers_is_named() -> None:
    message = refusal(peft_file(prompt_embeddings=prompt(3, 16 * 5)))
    assert "fit 5 layers, the base model has 2" in message


def test_a_width_that_fits_nothing_is_refused_with_both_that_would() -> None:
    message = refusal(peft_file(prompt_embeddings=prompt(3, 31)))
    assert "rows of 31 elements" in message
    assert "or 24 for a soft prompt" in message


def test_modules_to_save_are_refused_by_name() -> None:
    name = "base_model.model.lm_head.weight"
    message = refusal(peft_file(None, **{"prompt_embeddings": prompt(3, 32), name: prompt(10, 4)}))
    assert name in message
    assert "modules_to_save" in message


def test_half_a_multitask_file_is_refused() -> None:
    data = peft_file(prompt_embeddings=prompt(5, 24), prefix_task_cols=torch.rand(3, 5, 2))
    assert "tensor prefix_task_rows is missing" in refusal(data)


def test_unknown_metadata_is_refused() -> None:
    data = peft_file({"format": "pt", "extra": "1"}, prompt_embeddings=prompt(3, 32))
    assert "unexpected metadata key 'extra'" in refusal(data)


@pytest.mark.parametrize(
    ("peft_type", "message"),
    [
        ("LORA", "expected one of PREFIX_TUNING"),
        ("MULTITASK_PROMPT_TUNING", "the tensors are those of PREFIX_TUNING"),
        ("PROMPT_TUNING", "rows of 32 elements"),
    ],
)
def test_a_type_that_contradicts_the_file_is_refused(peft_type: str, message: str) -> None:
    data = peft_file(prompt_embeddings=prompt(3, 32))
    assert message in refusal(data, peft_type=peft_type)


def test_a_task_index_for_a_file_without_tasks_is_refused() -> None:
    assert "no multitask" in refusal(peft_file(prompt_embeddings=prompt(3, 32)), task_index=0)
    assert "no PEFT prompt" in refusal(make_artifact(), task_index=0)


def test_a_wrong_rank_is_refused() -> None:
    data = peft_file(prompt_embeddings=torch.rand(3, 4, 8))
    assert "expected a shape [P, width], got [3, 4, 8]" in refusal(data)


def test_more_tokens_than_the_server_allows_are_refused_from_the_header_alone() -> None:
    data = peft_file(prompt_embeddings=prompt(17, 32))
    head = bytearray(data[:200])
    with pytest.raises(ImportRefused, match="17 tokens, this server and its model allow 16"):
        recognise(head, len(data), BASE, LIMITS, ImportOptions())


def test_keys_and_values_of_different_size_can_not_come_from_peft() -> None:
    base = replace(BASE, layout=KVLayout((LayerLayout(2, 6, 4),) * 2, "float32"))
    assert "differ in their head dimension" in refusal(
        peft_file(prompt_embeddings=prompt(3, 32)), base
    )


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinity"), (1e30, "magnitude 1e+30")]
)
def test_a_soft_prompt_that_can_not_be_computed_with_is_refused(value: float, message: str) -> None:
    rows = prompt(3, 24)
    rows[1, 1] = value
    assert message in refusal(peft_file(prompt_embeddings=rows))


def test_a_prefix_with_nan_is_refused_by_the_layer_that_holds_it() -> None:
    rows = prompt(3, 32)
    rows[1, 9] = float("nan")
    artifact, _ = imported(peft_file(prompt_embeddings=rows))
    assert isinstance(artifact, bytes)
    with pytest.raises(IncompatiblePrefix, match="layer 0 value holds NaN"):
        accept(bytearray(artifact), digest_of(artifact), BASE, LIMITS)


def test_the_reader_of_foreign_files_is_as_strict_as_that_of_artifacts() -> None:
    data = peft_file(prompt_embeddings=prompt(3, 32))
    for broken in (data + b"\0", data[:-1], data.replace(b"data_offsets", b"data_offsetz", 1)):
        with pytest.raises(MalformedArtifact):
            imported(broken)


def test_an_artifact_is_stored_as_it_is() -> None:
    data = make_artifact()
    assert recognise(bytearray(data), len(data), BASE, LIMITS, ImportOptions()) is None
    assert decode(data, "sha256:x").manifest.num_virtual_tokens == 3
