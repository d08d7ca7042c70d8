"""A prefix is tried on the model: what is right passes, and each way of being wrong is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prefix_store.artifact import Prefix
from prefix_store.errors import ProofFailed
from prefix_store.proof import Proof
from prefix_store.spec import Probe
from server.errors import EngineOverloaded
from server.kvcache.kv_cache import LayerKV
from server.model.attention import make_attention_backend
from server.model.attention.base import AttentionBackend, AttentionParams
from server.model.attention.sdpa import SdpaAttention
from server.model.forward_batch import ForwardBatch
from server.model.loader import LoadedModel, adopt_model
from server.model.prover import Prover, make_probe
from tests.engine_harness import random_prefix
from tests.tiny_models import ARCHITECTURES, VOCAB, tiny_model

BACKEND = make_attention_backend("auto")
IDS = (11, 7, 5, 3, 2)


def adopted(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
    return adopt_model(tiny_model(architecture).to(dtype), model_id="tiny")


def tried(model: LoadedModel, prefix: Prefix, backend: AttentionBackend = BACKEND) -> Proof:
    trial = Prover(model, backend).prepare(prefix)
    trial.smoke()
    return trial.probe()


def changed(prefix: Prefix, **manifest: Any) -> Prefix:
    return replace(prefix, manifest=prefix.manifest.model_copy(update=manifest))


def probe_of_transformers(module: nn.Module, prefix: Prefix) -> Probe:
    """What a maker without prefixd would write: transformers' own logits behind `past_key_values`."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    module.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        logits = module(torch.tensor([IDS]), past_key_values=cache).logits[0, -1]
    module.set_attn_implementation("prefixd")  # type: ignore[operator]
    top = logits.log_softmax(-1).topk(8)
    return Probe(
        input_ids=IDS,
        top_ids=tuple(top.indices.tolist()),
        top_logprobs=tuple(top.values.tolist()),
    )


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_what_transformers_computes_is_reproduced_on_every_architecture(architecture: str) -> None:
    module = tiny_model(architecture)
    model = adopt_model(module, model_id="tiny")
    prefix = random_prefix(model, 6, seed=1)
    probe = probe_of_transformers(module, prefix)

    proof = tried(model, changed(prefix, probe=probe))

    assert proof.probe_difference is not None
    assert proof.probe_difference < 1e-4
    assert proof.probe_tolerance == 0.01
    assert proof.unverified == ()


def test_without_a_probe_that_is_said() -> None:
    model = adopted()
    proof = tried(model, random_prefix(model, 5, seed=1))
    assert proof.as_answer() == {"smoke": "passed", "probe": None}
    assert "no probe" in proof.unverified[0]


def swapped_layers(prefix: Prefix) -> Prefix:
    return replace(prefix, keys=prefix.keys[::-1])


def keys_for_values(prefix: Prefix) -> Prefix:
    return replace(prefix, keys=prefix.values, values=prefix.keys)


def mixed_heads(prefix: Prefix) -> Prefix:
    return replace(prefix, values=tuple(value.flip(1) for value in prefix.values))


def other_positions(prefix: Prefix) -> Prefix:
    return changed(prefix, token_start=0)


def reversed_tokens(prefix: Prefix) -> Prefix:
    """The pairs of key and value come apart."""
    return replace(prefix, keys=tuple(key.flip(0) for key in prefix.keys))


@pytest.mark.parametrize(
    "fault", [swapped_layers, keys_for_values, mixed_heads, other_positions, reversed_tokens]
)
def test_a_prefix_of_another_layout_or_position_does_not_reproduce_its_probe(fault: Any) -> None:
    model = adopted()
    prefix = random_prefix(model, 6, seed=1)
    good = changed(prefix, probe=make_probe(model, BACKEND, prefix, IDS))
    assert tried(model, good).probe_difference == 0
    with pytest.raises(ProofFailed, match="the probe is not reproduced: token"):
        tried(model, fault(good))


def test_the_same_shape_with_other_weights_does_not_reproduce_a_probe() -> None:
    model = adopted()
    prefix = random_prefix(model, 6, seed=1)
    probe = make_probe(model, BACKEND, prefix, IDS)
    other = adopt_model(tiny_model("llama", seed=1), model_id="tiny")
    with pytest.raises(ProofFailed) as caught:
        tried(other, changed(prefix, probe=probe))
    assert caught.value.problems[0].pointer == "/manifest/probe"


def test_a_token_that_a_probe_leaves_out_may_not_be_more_probable_than_those_it_lists() -> None:
    model = adopted()
    prefix = random_prefix(model, 6, seed=1)
    full = make_probe(model, BACKEND, prefix, IDS)
    without_the_first = full.model_copy(
        update={"top_ids": full.top_ids[1:], "top_logprobs": full.top_logprobs[1:]}
    )
    with pytest.raises(ProofFailed):
        tried(model, changed(prefix, probe=without_the_first))


def test_the_tolerance_is_the_probes_own_or_that_of_the_serving_dtype() -> None:
    model = adopted()
    prefix = random_prefix(model, 6, seed=1)
    probe = make_probe(model, BACKEND, prefix, IDS)
    off = tuple(value - 0.02 for value in probe.top_logprobs)
    with pytest.raises(ProofFailed, match=r"differences of up to 0\.01 are allowed, 0\.02"):
        tried(model, changed(prefix, probe=probe.model_copy(update={"top_logprobs": off})))
    lenient = probe.model_copy(update={"top_logprobs": off, "tolerance": 0.05})
    proof = tried(model, changed(prefix, probe=lenient))
    assert proof.probe_difference == pytest.approx(0.02, abs=1e-4)
    assert proof.probe_tolerance == 0.05


def test_values_that_are_finite_and_overflow_inside_attention_are_refused() -> None:
    model = adopted(dtype=torch.float16)
    prefix = random_prefix(model, 5, seed=1)
    huge = replace(prefix, values=tuple(torch.full_like(v, 6e4) for v in prefix.values))
    with pytest.raises(ProofFailed, match="NaN or infinite, although each of its values"):
        tried(model, huge)
    tried(model, prefix)


class LeakingAttention(SdpaAttention):
    """Every row of a step gets something of the pack's last token."""

    def attend(
        self, queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch
    ) -> Tensor:
        output = super().attend(queries, layer, params, batch)
        return output + 1e-6 * output[-1:]


def test_a_prefix_that_changes_its_neighbours_logits_is_refused() -> None:
    model = adopted()
    with pytest.raises(ProofFailed, match="gets other logits when it runs beside this prefix"):
        tried(model, random_prefix(model, 5, seed=1), LeakingAttention())


def test_a_prefix_that_leaves_few_positions_is_tried_with_fewer_tokens() -> None:
    """One prover for all: what it remembers of an undisturbed row is by the neighbour's length."""
    model = adopted("gpt2")
    assert model.position_limit is not None
    prover = Prover(model, BACKEND)
    for left in (1, 2, 7, 8, 100, 1):
        prefix = changed(
            random_prefix(model, 5, seed=left), token_start=model.position_limit - left
        )
        prover.prepare(prefix).smoke()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_float32_probe_is_reproduced_in_bfloat16_within_its_tolerance(architecture: str) -> None:
    precise, rounded = adopted(architecture), adopted(architecture, torch.bfloat16)
    prefix = random_prefix(precise, 6, seed=1)
    gentle = replace(prefix, keys=tuple(k / 4 for k in prefix.keys))
    probe = make_probe(precise, BACKEND, gentle, IDS).model_copy(update={"tolerance": 1.0})
    proof = tried(rounded, changed(gentle, probe=probe))
    assert proof.probe_difference is not None
    assert 0 < proof.probe_difference < 1.0


def test_too_little_device_memory_is_a_reason_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adopted()

    def no_memory(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", no_memory)
    with pytest.raises(EngineOverloaded, match="later"):
        Prover(model, BACKEND).prepare(random_prefix(model, 5, seed=1))


def test_a_trial_leaves_the_models_attention_as_it_was() -> None:
    model = adopted()
    before = model.module.prefixd_attention
    tried(model, random_prefix(model, 5, seed=1))
    assert model.module.prefixd_attention is before


def test_probes_are_made_of_ids_that_the_model_has() -> None:
    model = adopted()
    probe = make_probe(model, BACKEND, random_prefix(model, 5, seed=1), IDS)
    assert max(probe.top_ids) < VOCAB
    assert list(probe.top_logprobs) == sorted(probe.top_logprobs, reverse=True)
