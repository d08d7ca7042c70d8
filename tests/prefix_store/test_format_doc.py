"""`docs/prefix-format.md` is normative, so it must say what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import BaseModel
from transformers import LlamaConfig, LlamaForCausalLM

from prefix_store.artifact import digest_of
from prefix_store.fingerprint import base_fingerprint
from prefix_store.header import FILE_DTYPES, LENGTH_BYTES, MAX_HEADER_BYTES
from prefix_store.manifest import MAX_NESTING
from prefix_store.spec import FORMAT_VERSION, PrefixManifest
from prefix_store.validation import Limits, accept
from server.model.attention import make_attention_backend
from server.model.loader import adopt_model
from server.model.prover import Prover
from tests.prefix_store.builders import base_with

DOC = (Path(__file__).parents[2] / "docs" / "prefix-format.md").read_text()


def fields_of(model: type[BaseModel], above: str = "") -> dict[str, bool]:
    """Field -> whether a file must have it, as the code has it, nested fields behind a dot."""
    found = {}
    for name, field in model.model_fields.items():
        found[f"{above}{name}"] = field.is_required()
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found |= fields_of(inner, f"{above}{name}.")
    return found


def test_the_manifest_table_lists_exactly_the_fields_of_the_manifest() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| [^|]+ \| (yes|no) \|", DOC, flags=re.MULTILINE)
    documented = {name: required == "yes" for name, required in rows}
    # Built in code, a manifest is of the current version; read from a file, it must say so.
    assert documented == fields_of(PrefixManifest) | {"format_version": True}


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    for sentence in [
        f"# The prefix format, version {FORMAT_VERSION}",
        f"a multiple of 8 and at most {MAX_HEADER_BYTES}",
        f"at most {MAX_NESTING} levels of nesting",
        f"{Limits().max_num_virtual_tokens} unless configured",
        f"none beyond ±{Limits().max_abs_value:.0f}",
        f"longer than {MAX_HEADER_BYTES + LENGTH_BYTES} bytes",
    ]:
        assert sentence in DOC
    assert all(f"`{dtype}`" in DOC for dtype in FILE_DTYPES)


def test_the_example_writes_an_artifact_that_a_server_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)[0]
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.chdir(tmp_path)

    exec(example, {"model": model, "tokenizer": None, "input_ids": torch.tensor([[1, 2, 3, 4, 5]])})

    data = bytearray((tmp_path / "task.safetensors").read_bytes())
    base = base_with(fingerprint=base_fingerprint(model))
    prefix = accept(data, digest_of(data), base, Limits())
    assert prefix.manifest.first_position == 5
    assert prefix.keys[1].shape == (5, 2, 4)
    prover = Prover(adopt_model(model, model_id="tiny"), make_attention_backend("auto"))
    trial = prover.prepare(prefix)
    trial.smoke()
    proof = trial.probe()
    assert proof.probe_difference is not None
    assert proof.probe_difference < 1e-4
