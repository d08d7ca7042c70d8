"""The file format: what goes in comes out, here and in safetensors' own library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_store.artifact import TORCH_DTYPES, decode, digest_of, encode, save
from prefix_store.errors import MalformedArtifact
from prefix_store.header import tensor_names
from prefix_store.spec import KVLayout, LayerLayout
from tests.prefix_store.builders import TINY_BASE, base_with, make_artifact, manifest_for, random_kv


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    layers=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4
    ),
    dtype=st.sampled_from(sorted(TORCH_DTYPES)),
)
def test_what_is_encoded_is_decoded_and_safetensors_agrees(
    num_tokens: int, layers: list[tuple[int, int, int]], dtype: str
) -> None:
    layout = KVLayout(tuple(LayerLayout(*layer) for layer in layers), dtype)
    base = base_with(layout=layout)
    keys, values = random_kv(base, num_tokens, dtype=dtype)
    manifest = manifest_for(base, num_tokens, training={"steps": 3, "note": None})

    data = encode(manifest, keys, values)
    prefix = decode(data, digest_of(data))

    theirs = safetensors.torch.load(data)
    assert sorted(theirs) == tensor_names(len(layers))
    assert prefix.manifest == manifest
    assert prefix.num_bytes == num_tokens * layout.bytes_per_token
    for layer in range(len(layers)):
        assert torch.equal(prefix.keys[layer], keys[layer])
        assert torch.equal(prefix.values[layer], values[layer])
        assert torch.equal(theirs[f"dec_self.{layer:03d}.k"], keys[layer])
        assert torch.equal(theirs[f"dec_self.{layer:03d}.v"], values[layer])


def test_a_file_written_by_the_safetensors_library_is_accepted(tmp_path: Path) -> None:
    keys, values = random_kv(TINY_BASE, 3)
    tensors = dict(zip(tensor_names(2), [keys[0], values[0], keys[1], values[1]], strict=True))
    manifest = manifest_for(TINY_BASE, 3)
    metadata = {"prefixd": manifest.model_dump_json(), "format": "pt"}
    safetensors.torch.save_file(tensors, tmp_path / "a", metadata=metadata)

    prefix = decode((tmp_path / "a").read_bytes(), "sha256:any")

    assert prefix.manifest == manifest
    assert torch.equal(prefix.values[1], values[1])


def test_the_same_content_gives_the_same_digest() -> None:
    assert digest_of(make_artifact(seed=1)) == digest_of(make_artifact(seed=1))
    assert digest_of(make_artifact(seed=1)) != digest_of(make_artifact(seed=2))


def test_tensors_that_are_views_and_need_gradients_are_encoded_by_value() -> None:
    keys, values = random_kv(TINY_BASE, 3)
    views = [key.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for key in keys]
    assert not views[0].is_contiguous()

    manifest = manifest_for(TINY_BASE, 3)
    assert encode(manifest, views, values) == encode(manifest, keys, values)


def test_save_takes_tensors_by_name_in_any_order(tmp_path: Path) -> None:
    keys, values = random_kv(TINY_BASE, 3)
    named = dict(zip(tensor_names(2), [keys[0], values[0], keys[1], values[1]], strict=True))
    manifest = manifest_for(TINY_BASE, 3)

    save(tmp_path / "a", dict(reversed(named.items())), manifest)

    assert (tmp_path / "a").read_bytes() == encode(manifest, keys, values)


def test_save_names_missing_and_unknown_tensors(tmp_path: Path) -> None:
    keys, _ = random_kv(TINY_BASE, 3)
    with pytest.raises(MalformedArtifact, match=r"dec_self\.000\.v.*dec_self\.000\.x"):
        save(
            tmp_path / "a",
            {"dec_self.000.k": keys[0], "dec_self.000.x": keys[0]},
            manifest_for(TINY_BASE, 3),
        )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ([], [], "as many keys as values, got 0 and 0"),
        ([torch.ones(3, 2, 4)], [], "got 1 and 0"),
        ([torch.ones(3, 8)], [torch.ones(3, 2, 4)], r"expected the shape \[3, H_kv, D\]"),
        ([torch.ones(4, 2, 4)], [torch.ones(4, 2, 4)], r"got \[4, 2, 4\]"),
        ([torch.ones(3, 2, 4)], [torch.ones(3, 2, 4).half()], "one dtype"),
        ([torch.ones(3, 2, 4).double()], [torch.ones(3, 2, 4).double()], "float64"),
        ([torch.ones(3, 0, 4)], [torch.ones(3, 0, 4)], "positive integers"),
    ],
)
def test_encode_refuses_what_decode_would_refuse(
    keys: list[torch.Tensor], values: list[torch.Tensor], message: str
) -> None:
    with pytest.raises(MalformedArtifact, match=message):
        encode(manifest_for(TINY_BASE, 3), keys, values)


def test_a_prefix_in_its_own_dtype_shares_memory_and_in_another_does_not() -> None:
    prefix = decode(bytearray(make_artifact()), "sha256:any")
    assert prefix.to("float32").keys[0].data_ptr() == prefix.keys[0].data_ptr()
    half = prefix.to("bfloat16")
    assert half.num_bytes * 2 == prefix.num_bytes
    assert torch.equal(half.keys[1], prefix.keys[1].bfloat16())


def test_decoding_bytes_does_not_alias_them() -> None:
    data = make_artifact()
    prefix = decode(data, "sha256:any")
    prefix.keys[0].zero_()
    assert data == make_artifact()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_too_small_for_a_normal_number_are_served_as_zero(dtype: str) -> None:
    """A CPU computes with them many times slower, for every row of the batch."""
    data = make_artifact()
    prefix = decode(data, "sha256:any")
    tiny = replace(prefix, keys=tuple(torch.full_like(key, 1e-40) for key in prefix.keys))
    served = tiny.to(dtype)
    assert all(bool((key == 0).all()) for key in served.keys)
    assert all(
        torch.equal(a, b.to(a.dtype)) for a, b in zip(served.values, prefix.values, strict=True)
    )


def test_small_values_of_float16_stay_what_they_are() -> None:
    data = make_artifact(dtype="float16")
    prefix = decode(data, "sha256:any")
    small = replace(prefix, keys=tuple(torch.full_like(key, 1e-6) for key in prefix.keys))
    assert all(bool((key > 0).all()) for key in small.to("float16").keys)
