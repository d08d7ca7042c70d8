"""Every rule by itself, all faults at once, and sentences that say what was expected and what came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prefix_store.artifact import encode
from prefix_store.errors import IncompatiblePrefix
from prefix_store.spec import BaseSpec, KVLayout, LayerLayout, digest_of
from prefix_store.validation import (
    Limits,
    accept,
    max_artifact_bytes,
    value_warnings,
    warnings_for,
)
from tests.prefix_store.builders import TINY_BASE, base_with, make_artifact, manifest_for, random_kv

LIMITS = Limits(max_num_virtual_tokens=16)


def refusal(data: bytes, base: BaseSpec = TINY_BASE, limits: Limits = LIMITS) -> str:
    with pytest.raises(IncompatiblePrefix) as caught:
        accept(bytearray(data), digest_of(data), base, limits)
    return str(caught.value)


def layout(*layers: tuple[int, int, int], dtype: str = "float32") -> KVLayout:
    return KVLayout(tuple(LayerLayout(*layer) for layer in layers), dtype)


def test_a_valid_artifact_is_accepted_in_the_dtype_of_its_file() -> None:
    data = make_artifact(dtype="float16")
    prefix = accept(bytearray(data), digest_of(data), TINY_BASE, LIMITS)
    assert prefix.digest == digest_of(data)
    assert prefix.keys[0].dtype == torch.float16


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            base_with(layout=layout((2, 4, 4))),
            "the prefix has 2 layers, the base model has 1",
        ),
        (
            base_with(layout=layout(*[(2, 4, 4)] * 3)),
            "the prefix has 2 layers, the base model has 3",
        ),
        (
            base_with(layout=layout((2, 4, 4), (3, 4, 4))),
            "layer 1 key has 2 heads, the base model has 3; layer 1 value has 2 heads, the base model has 3",
        ),
        (
            base_with(layout=layout((2, 4, 4), (2, 6, 4))),
            "layer 1 key has a head dimension of 4, the base model has 6",
        ),
        (
            base_with(layout=layout((2, 4, 5), (2, 4, 4))),
            "layer 0 value has a head dimension of 4, the base model has 5",
        ),
        (base_with(model_type="qwen2"), "model_type is 'llama', the base model is 'qwen2'"),
        (
            base_with(position_scheme="learned", rope_theta=None),
            "k_space is 'post_rope', a base model with 'learned' positions needs 'none'; "
            "rope_theta is 10000, the base model has none",
        ),
        (base_with(rope_theta=1e6), "rope_theta is 10000, the base model has 1e+06"),
        (
            base_with(fingerprint="sha256:" + "b" * 64),
            f"trained on a base whose weights fingerprint is sha256:{'a' * 64}, the base model's is sha256:{'b' * 64}",
        ),
        (
            base_with(position_limit=3),
            "requests would start at position 3, the base model has 3 positions",
        ),
    ],
)
def test_each_mismatch_is_told_in_one_sentence(base: BaseSpec, message: str) -> None:
    assert refusal(make_artifact(), base) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k_space": "none"},
            "k_space is 'none', a base model with 'rope' positions needs 'post_rope'",
        ),
        (
            {"base_model": {"config_fingerprint": "sha256:" + "c" * 64}},
            f"trained on a base whose settings fingerprint is sha256:{'c' * 64}, "
            f"the base model's is sha256:{'d' * 64}",
        ),
        (
            {"base_model": {"tokenizer_fingerprint": "sha256:" + "c" * 64}},
            f"trained on a base whose tokenizer fingerprint is sha256:{'c' * 64}, "
            f"the base model's is sha256:{'e' * 64}",
        ),
        (
            {"probe": {"input_ids": [99, 100], "top_ids": [0], "top_logprobs": [-1.0]}},
            "probe.input_ids holds 100, the base model has 100 tokens",
        ),
        (
            {"probe": {"input_ids": [1], "top_ids": [0, 100], "top_logprobs": [-1.0, -2.0]}},
            "probe.top_ids holds 100, the base model has 100 tokens",
        ),
        (
            {
                "token_start": 126,
                "probe": {"input_ids": [1, 2, 3], "top_ids": [0], "top_logprobs": [-1.0]},
            },
            "the probe ends at position 129, the base model has 128 positions",
        ),
        ({"base_model": {"vocab_size": 101}}, "vocab_size is 101, the base model has 100"),
        (
            {"token_start": 128},
            "requests would start at position 128, the base model has 128 positions",
        ),
    ],
)
def test_each_wrong_manifest_field_is_told_in_one_sentence(
    changes: dict[str, Any], message: str
) -> None:
    known = base_with(
        config_fingerprint="sha256:" + "d" * 64, tokenizer_fingerprint="sha256:" + "e" * 64
    )
    assert refusal(make_artifact(**changes), known) == message


def test_every_fault_is_told_at_once() -> None:
    base = base_with(model_type="gpt2", rope_theta=5.0, layout=layout((3, 5, 4)))
    faults = refusal(make_artifact(), base).split("; ")
    assert len(faults) == 1 + 3 + 1 + 1  # layers, (k heads, k dim, v heads), model_type, theta


def test_a_prefix_from_before_the_gqa_fix_is_recognised() -> None:
    full_heads = base_with(layout=layout((8, 4, 4), (8, 4, 4)))
    message = refusal(make_artifact(full_heads))
    assert "layer 1 value has 8 heads, the base model has 2" in message
    assert "one head per attention head, as PEFT wrote before it supported grouped-query" in message


def test_the_tokens_of_the_tensors_must_be_those_of_the_manifest() -> None:
    data = make_artifact(num_virtual_tokens=4)
    faulty = data.replace(b'\\"num_virtual_tokens\\":4', b'\\"num_virtual_tokens\\":5')
    assert faulty != data
    assert "layer 0 key has 4 tokens, the manifest says 5" in refusal(faulty)


def test_a_prefix_longer_than_the_server_allows_is_refused() -> None:
    assert (
        refusal(make_artifact(num_virtual_tokens=17))
        == "the prefix has 17 tokens, this server allows 16"
    )


def test_the_last_position_that_leaves_room_for_one_token_is_accepted() -> None:
    data = make_artifact(token_start=127)
    accept(bytearray(data), digest_of(data), TINY_BASE, LIMITS)
    accept(bytearray(data), digest_of(data), base_with(position_limit=None), LIMITS)


def artifact_holding(value: float, *, dtype: str = "float32") -> bytes:
    keys, values = random_kv(TINY_BASE, 3, dtype=dtype)
    values[1][2, 1, 3] = value  # the very last number of the file
    return encode(manifest_for(TINY_BASE, 3), keys, values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_value_that_is_not_finite_is_refused(value: float, dtype: str) -> None:
    assert refusal(artifact_holding(value, dtype=dtype)) == "layer 1 value holds NaN or infinity"


@pytest.mark.parametrize("value", [70000.0, -70000.0])
def test_a_value_that_overflows_only_in_the_serving_dtype_is_refused(value: float) -> None:
    limits = replace(LIMITS, max_abs_value=1e9)
    data = artifact_holding(value)
    accept(bytearray(data), digest_of(data), TINY_BASE, limits)
    message = refusal(data, base_with(dtype="float16"), limits)
    assert message == "layer 1 value holds a value that overflows float16, the base model's dtype"


def test_a_finite_but_destructive_value_is_refused() -> None:
    assert "beyond the allowed magnitude of 10000" in refusal(artifact_holding(-10001.0))
    data = artifact_holding(10000.0)
    accept(bytearray(data), digest_of(data), TINY_BASE, LIMITS)


def test_warnings_name_a_missing_fingerprint_and_a_window_that_is_too_short() -> None:
    windowed = base_with(layout=KVLayout((LayerLayout(2, 4, 4, window=3),) * 2, "float32"))
    assert warnings_for(manifest_for(windowed, 3), windowed) == ()
    unverified = manifest_for(windowed, 4, base_model={})
    assert [text.split(":")[0] for text in warnings_for(unverified, windowed)] == [
        "unverified base",
        "the prefix has 4 tokens, more than the sliding window of 3",
    ]


@pytest.mark.parametrize(
    ("dtype", "subnormal", "normal"),
    [("float32", 1e-39, 1.2e-38), ("bfloat16", 1e-39, 1.2e-38), ("float16", 6e-5, 6.2e-5)],
)
def test_many_subnormal_values_are_worth_a_warning(
    dtype: str, subnormal: float, normal: float
) -> None:
    keys, values = random_kv(TINY_BASE, 15, dtype=dtype)  # 480 values

    def warnings(count: int, value: float) -> tuple[str, ...]:
        keys[1].view(-1)[:count] = value
        data = encode(manifest_for(TINY_BASE, 15), keys, values)
        return value_warnings(accept(bytearray(data), digest_of(data), TINY_BASE, LIMITS))

    assert warnings(4, -subnormal) == ()
    assert warnings(100, 0.0) == warnings(100, normal) == ()
    [warning] = warnings(48, subnormal)
    assert warning.startswith(f"10% of the values are subnormal in {dtype}")


def test_the_largest_valid_artifact_is_within_the_size_limit() -> None:
    data = make_artifact(num_virtual_tokens=16, training={"note": "x" * 50_000})
    assert len(data) < max_artifact_bytes(TINY_BASE, 16) < len(data) + 64 * 1024
