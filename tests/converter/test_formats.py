"""Everything that is not PEFT's: each format's tensors come out where its own code would have put them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from converter.__main__ import main
from prefix_store.artifact import Prefix
from server.model.loader import adopt_model
from tests.engine_harness import generate_with_transformers
from tests.real_app import packed_logits
from tests.tiny_model_dir import save_tiny_model
from tests.tiny_models import tiny_model

P = 6
PROMPT = [5, 9, 21, 8, 60, 61, 7]
Convert = Callable[..., Prefix]
Refusal = Callable[..., str]


def mlp(width: int, mid: int, out: int, *, deep: bool = False) -> nn.Sequential:
    middle = [nn.Linear(mid, mid), nn.Tanh()] if deep else []
    return nn.Sequential(nn.Linear(width, mid), nn.Tanh(), *middle, nn.Linear(mid, out))


def cache_of(rows: Tensor, layers: int, heads: int) -> list[tuple[Tensor, Tensor]]:
    """[P, 2L*H*D] -> per layer K and V [P, H, D], by the way that these codes all share."""
    past = rows.detach().view(1, P, 2 * layers, heads, -1).permute(2, 0, 3, 1, 4).chunk(layers)
    return [(layer[0][0].transpose(0, 1), layer[1][0].transpose(0, 1)) for layer in past]


def assert_equal(prefix: Prefix, expected: list[tuple[Tensor, Tensor]]) -> None:
    for k, v, (key, value) in zip(prefix.keys, prefix.values, expected, strict=True):
        assert torch.allclose(k, key, atol=1e-6)
        assert torch.allclose(v, value, atol=1e-6)


def write(directory: Path, name: str, state: Any, config: dict[str, Any] | None = None) -> Path:
    directory.mkdir()
    torch.save(state, directory / name)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


# ---- Cartridges ----------------------------------------------------------------------------------


def cartridge(frozen: str | None, num_frozen: int = 1) -> tuple[dict[str, Any], list[Tensor]]:
    torch.manual_seed(1)

    def rows(count: int) -> nn.ParameterList:
        return nn.ParameterList([torch.randn(1, 2, count, 8) for _ in range(3)])

    state = {"trainable_keys": rows(P - num_frozen), "trainable_values": rows(P - num_frozen)}
    if frozen:
        state |= {f"{frozen}_keys": rows(num_frozen), f"{frozen}_values": rows(num_frozen)}
        parts = (state[f"{frozen}_keys"], state["trainable_keys"])
        return state, [
            torch.cat([a, b], dim=2)[0].transpose(0, 1) for a, b in zip(*parts, strict=True)
        ]
    return state, [keys[0].transpose(0, 1) for keys in state["trainable_keys"]]


@pytest.mark.parametrize("frozen", ["fixed", "frozen"])
def test_both_dialects_of_cartridges_are_read(
    frozen: str, base: Path, convert: Convert, tmp_path: Path
) -> None:
    state, keys = cartridge(frozen)
    torch.save(state, tmp_path / "cache-step9.pt")

    prefix = convert(tmp_path / "cache-step9.pt", "--base", base)

    assert prefix.manifest.first_position == P
    assert prefix.manifest.source["num_frozen_tokens"] == 1
    assert all(torch.equal(a, b) for a, b in zip(prefix.keys, keys, strict=True))


def test_a_cartridge_without_frozen_rows_is_read(
    base: Path, convert: Convert, tmp_path: Path
) -> None:
    state, keys = cartridge(None, 0)
    torch.save(state, tmp_path / "c.pt")
    assert torch.equal(convert(tmp_path / "c.pt", "--base", base).keys[2], keys[2])


def test_broken_cartridges_are_refused_by_name(
    base: Path, refusal: Refusal, tmp_path: Path
) -> None:
    state, _ = cartridge("fixed")
    file = tmp_path / "c.pt"

    def refused(**changes: Any) -> str:
        torch.save(state | changes, file)
        return refusal(file, "--base", base)

    assert "expected one of the two" in refused(frozen_keys=state["fixed_keys"])
    assert "unexpected entry 'extra'" in refused(extra=torch.zeros(1))
    assert "[1, H_kv, T, D]" in refused(trainable_keys=nn.ParameterList([torch.zeros(2, 2)] * 3))
    nan = nn.ParameterList([torch.full((1, 2, P - 1, 8), torch.nan)] * 3)
    assert "dec_self layer 0 keys: NaN or infinity" in refused(trainable_keys=nan)
    wide = nn.ParameterList([torch.zeros(1, 6, P, 8)] * 3)
    torch.save({"trainable_keys": wide, "trainable_values": wide}, file)
    assert "has 6 heads, the base model has 2" in refusal(file, "--base", base)
    torch.save({"trainable_keys": wide, "trainable_values": wide}, file)
    assert "does not say which model it is for" in refusal(file)


# ---- Li & Liang ----------------------------------------------------------------------------------

GPT2 = {
    "model_type": "gpt2",
    "n_layer": 3,
    "n_head": 6,
    "n_embd": 48,
    "vocab_size": 199,
    "preseqlen": P,
}


def gpt2_variants() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """name -> (state dict, the rows that it stands for)."""
    torch.manual_seed(2)
    wte = nn.Embedding(P, 48)
    variants = {}
    for name in ("mlp", "deep"):
        net = mlp(48, 20, 2 * 3 * 48, deep=name == "deep")
        state = {f"control_trans.{k}": v for k, v in net.state_dict().items()}
        variants[name] = (state | {"wte.weight": wte.weight.detach()}, net(wte.weight))
    rows = torch.randn(P, 2 * 3 * 48)
    variants["flat"] = ({"control_trans": rows.flatten()}, rows)
    shallow = rows.view(1, P, 6, 6, 8).permute(2, 0, 3, 1, 4).contiguous()  # [2L, 1, H, P, D]
    variants["words"] = ({"control_trans": shallow}, rows)
    return variants


@pytest.mark.parametrize("variant", ["mlp", "deep", "flat", "words"])
def test_a_gpt2_directory_needs_no_base_and_gives_the_rows_of_its_mlp(
    variant: str, convert: Convert, tmp_path: Path
) -> None:
    state, rows = gpt2_variants()[variant]
    source = write(tmp_path / "run", "pytorch_model.bin", state, GPT2)

    prefix = convert(source)

    assert_equal(prefix, cache_of(rows, 3, 6))
    assert prefix.manifest.first_position == P
    assert prefix.manifest.model_type == "gpt2"
    assert prefix.manifest.base_model.vocab_size == 199


def test_a_gpt2_directory_works_on_its_model(convert: Convert, tmp_path: Path) -> None:
    state, rows = gpt2_variants()["mlp"]
    source = write(tmp_path / "run", "pytorch_model.bin", state, GPT2)
    directory = save_tiny_model(tmp_path / "gpt2", "gpt2")

    prefix = convert(source, "--base", directory)

    module = tiny_model("gpt2")
    ours = packed_logits(adopt_model(module, model_id="tiny"), prefix, PROMPT)
    tokens = generate_with_transformers(module, PROMPT, prefix, 1)
    assert int(ours[-1].argmax()) == tokens[0]
    assert_equal(prefix, cache_of(rows, 3, 6))


def test_an_infix_is_refused_by_name(refusal: Refusal, tmp_path: Path) -> None:
    state, _ = gpt2_variants()["mlp"]
    infix = state | {"wte2.weight": torch.zeros(P, 48)}
    source = write(tmp_path / "run", "pytorch_model.bin", infix, GPT2)
    assert "an infix depends on the request's own text" in refusal(source)


def test_a_bart_directory_gives_three_blocks_and_tokens_at_zero(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state: dict[str, Tensor] = {}
    rows = {}
    for block, wte, name in (
        ("dec_self", "wte", "control_trans"),
        ("dec_cross", "wte2", "control_trans2"),
        ("enc_self", "wte_enc", "control_trans_enc"),
    ):
        embedding, net = nn.Embedding(P, 24), mlp(24, 10, 2 * 2 * 24)
        state |= {f"{name}.{k}": v for k, v in net.state_dict().items()}
        state[f"{wte}.weight"] = embedding.weight.detach()
        rows[block] = net(embedding.weight)
    config = {
        "model_type": "bart",
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    source = write(tmp_path / "run", "pytorch_model.bin", state, config)
    target = tmp_path / "out.safetensors"

    assert main([str(source), str(target)]) == 0

    tensors = load_file(target)
    assert len(tensors) == 3 * 2 * 2
    for block, expected in rows.items():
        for layer, (key, value) in enumerate(cache_of(expected, 2, 4)):
            assert torch.allclose(tensors[f"{block}.{layer:03d}.k"], key, atol=1e-6)
            assert torch.allclose(tensors[f"{block}.{layer:03d}.v"], value, atol=1e-6)
    header = target.read_bytes()[:4096]
    assert b'\\"token_start\\":0' in header


# ---- P-tuning v2 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("projected", [False, True])
def test_p_tuning_v2_starts_at_zero_and_rebasing_changes_no_logit(
    projected: bool, base: Path, convert: Convert, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    embedding = torch.randn(P, 20 if projected else 96)
    net = mlp(20, 12, 96)
    state = {
        "transformer.prefix_encoder.embedding.weight": embedding,
        "score.weight": torch.ones(2),
    }
    if projected:
        state |= {f"transformer.prefix_encoder.trans.{k}": v for k, v in net.state_dict().items()}
    source = write(tmp_path / "run", "pytorch_model.bin", state)

    prefix = convert(source, "--base", base)
    moved = convert(source, "--base", base, "--rebase")

    assert_equal(prefix, cache_of(net(embedding) if projected else embedding, 3, 2))
    assert prefix.manifest.first_position == 0
    assert moved.manifest.first_position == P
    model = adopt_model(tiny_model("llama"), model_id="tiny")
    logits = [packed_logits(model, p, PROMPT) for p in (prefix, moved)]
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-5


def test_chatglm_brings_its_own_geometry(tmp_path: Path, convert: Convert) -> None:
    config = {
        "model_type": "chatglm",
        "num_layers": 3,
        "num_attention_heads": 6,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 8,
    }
    rows = torch.randn(P, 96)
    state = {"transformer.prefix_encoder.embedding.weight": rows}
    source = write(tmp_path / "run", "pytorch_model.bin", state, config)

    prefix = convert(source)

    assert_equal(prefix, cache_of(rows, 3, 2))
    assert prefix.manifest.model_type == "chatglm"
    assert prefix.manifest.k_space == "post_rope"


def test_learned_positions_are_not_rebased(refusal: Refusal, tmp_path: Path) -> None:
    state = {"prefix_encoder.embedding.weight": torch.randn(P, 2 * 3 * 48)}
    source = write(tmp_path / "run", "pytorch_model.bin", state)
    directory = save_tiny_model(tmp_path / "gpt2", "gpt2")
    assert "needs rotary positions" in refusal(source, "--base", directory, "--rebase")


# ---- adapter-hub -----------------------------------------------------------------------------------


def adapter_hub(directory: Path, state: dict[str, Tensor], **settings: Any) -> Path:
    directory.mkdir()
    torch.save(state, directory / "pytorch_adapter.bin")
    inner = {
        "architecture": "prefix_tuning",
        "prefix_length": P,
        "non_linearity": "tanh",
        **settings,
    }
    (directory / "adapter_config.json").write_text(json.dumps({"config": inner, "name": "x"}))
    return directory


def test_an_adapter_hub_prefix_is_read_where_every_head_has_its_own_keys(
    convert: Convert, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    directory = save_tiny_model(tmp_path / "neox", "gpt_neox")
    place = "gpt_neox.prefix_tuning.prefix_tunings.x.self_prefix"
    wte, net = nn.Embedding(P, 48), mlp(48, 10, 2 * 3 * 48)
    state = {f"{place}.control_trans.{k}": v for k, v in net.state_dict().items()}
    state[f"{place}.wte.weight"] = wte.weight.detach()
    rows = net(wte.weight).detach()

    prefix = convert(adapter_hub(tmp_path / "a", state), "--base", directory)
    flat_state = {f"{place}.control_trans": rows.flatten()}
    flat = convert(adapter_hub(tmp_path / "b", flat_state, flat=True), "--base", directory)

    assert_equal(prefix, cache_of(rows, 3, 6))
    assert_equal(flat, cache_of(rows, 3, 6))
    assert prefix.manifest.first_position == 0


def test_gates_and_grouped_heads_are_refused_by_name(
    base: Path, refusal: Refusal, tmp_path: Path
) -> None:
    state = {"m.prefix_tunings.x.self_prefix.control_trans": torch.zeros(P * 96)}
    gated = adapter_hub(tmp_path / "gated", state, use_gating=True)
    grouped = adapter_hub(tmp_path / "grouped", state)
    assert "a gated prefix: its weight depends on the input" in refusal(gated, "--base", base)
    message = refusal(grouped, "--base", base)
    assert "one head per attention head (6); the base has 2 key/value heads" in message


# ---- a saved cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["{0}.keys {0}.values", "key_cache.{0} value_cache.{0}"])
def test_a_saved_cache_is_the_prompt_that_made_it(
    names: str, base: Path, convert: Convert, tmp_path: Path
) -> None:
    module = tiny_model("llama")
    prompt = [7, 8, 9, 10]
    with torch.no_grad():
        cache = module(torch.tensor([prompt]), use_cache=True).past_key_values
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        key, value = names.format(index).split()
        tensors |= {key: layer.keys.contiguous(), value: layer.values.contiguous()}
    save_file(tensors, tmp_path / "cache.safetensors")

    prefix = convert(tmp_path / "cache.safetensors", "--base", base)

    expected = generate_with_transformers(module, prompt + PROMPT, None, 8)
    assert generate_with_transformers(module, PROMPT, prefix, 8) == expected
