"""Keys moved by rotation: the same logits, exactly, where positions are a rotation; a refusal elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefix_store.artifact import Prefix, decode, digest_of
from prefix_store.errors import RebaseRefused
from prefix_store.importers.incoming import recognise
from prefix_store.importers.recognition import ImportOptions
from prefix_store.rebase import rebased_keys, rotated
from prefix_store.spec import LayerRotary
from prefix_store.validation import Limits
from server.model.base_spec import base_spec
from server.model.loader import adopt_model
from tests.engine_harness import random_prefix
from tests.prefix_store.builders import TINY_BASE, make_artifact
from tests.real_app import packed_logits
from tests.tiny_models import tiny_model

PROMPT = [5, 9, 21, 8, 60, 61, 7]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
MODELS = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3 with two thetas": ("gemma3_text", {}),
    "partial rotary": ("gpt_neox", {}),
    "yarn": ("llama", {"rope_parameters": YARN}),
}


@pytest.mark.parametrize("delta", [-5, 11, 100])
@pytest.mark.parametrize("name", MODELS)
def test_keys_and_tokens_that_move_together_leave_the_logits(name: str, delta: int) -> None:
    architecture, overrides = MODELS[name]
    model = adopt_model(tiny_model(architecture, **overrides), model_id="tiny")  # type: ignore[arg-type]
    prefix = random_prefix(model, 9, seed=4)
    before = packed_logits(model, prefix, PROMPT)

    keys = rebased_keys(prefix.keys, delta, base_spec(model))

    manifest = prefix.manifest.model_copy(update={"token_start": 9 + delta})
    moved = Prefix("sha256:moved", manifest, keys, prefix.values)
    assert float((packed_logits(model, moved, PROMPT) - before).abs().max()) <= 1e-5
    unmoved = Prefix("sha256:unmoved", manifest, prefix.keys, prefix.values)
    assert float((packed_logits(model, unmoved, PROMPT) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_forth_and_back_gives_the_same_keys_and_leaves_the_rest_alone(
    interleaved: bool,
) -> None:
    rotary = LayerRotary((1.0, 0.1), interleaved)
    keys = torch.randn(3, 2, 6)

    turned = rotated(keys, 7, rotary)

    assert torch.equal(turned[..., 4:], keys[..., 4:])
    assert not torch.allclose(turned[..., :4], keys[..., :4])
    assert torch.allclose(rotated(turned, -7, rotary), keys, atol=1e-6)
    assert torch.allclose(turned.norm(dim=-1), keys.norm(dim=-1))


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_learned_positions_can_not_be_moved(architecture: str) -> None:
    model = adopt_model(tiny_model(architecture), model_id="tiny")
    prefix = random_prefix(model, 3, seed=1)
    with pytest.raises(
        RebaseRefused, match="needs rotary positions, the base model's are 'learned'"
    ):
        rebased_keys(prefix.keys, 5, base_spec(model))


def test_a_rotation_that_is_not_known_is_not_guessed() -> None:
    with pytest.raises(RebaseRefused, match="not known exactly"):
        rebased_keys((), 5, TINY_BASE)


def test_an_upload_is_moved_to_start_at_p_and_says_so() -> None:
    rotary = LayerRotary((1.0, 0.01), False)
    base = replace(TINY_BASE, rotary=(rotary, rotary))
    data = make_artifact(num_virtual_tokens=3, token_start=0)
    options = ImportOptions(rebase=True)

    found = recognise(bytearray(data), len(data), base, Limits(), options)

    assert found is not None
    assert "rotated by +3 positions" in found.recognition.recognised
    artifact = found.read(bytearray(data), digest_of(data))
    assert isinstance(artifact, bytes)
    moved = decode(artifact, "sha256:x")
    assert moved.manifest.first_position == 3
    assert moved.manifest.source["rebased"] == {"delta": 3, "from_digest": digest_of(data)}
    assert torch.equal(moved.keys[1], rotated(decode(data, "").keys[1], 3, rotary))


def test_an_artifact_that_starts_at_p_already_is_stored_as_it_is() -> None:
    data = make_artifact()
    options = ImportOptions(rebase=True)
    assert recognise(bytearray(data), len(data), TINY_BASE, Limits(), options) is None
