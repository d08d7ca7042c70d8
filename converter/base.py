"""The base model that a prefix was trained on, from its directory: weights if they are there, else geometry.

With weights the artifact carries their fingerprint, keys can be rebased and soft prompts baked; from
`config.json` alone the layout is learned on the meta device, which computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from converter.errors import ConversionRefused
from prefix_store.spec import BaseSpec
from server.engine.tokenizer import Tokenizer
from server.errors import ModelRefused
from server.model.base_spec import base_spec
from server.model.loader import LoadedModel, adopt_model, check_config, load_model


@dataclass(frozen=True)
class Base:
    """`spec` None: an encoder-decoder, of which only `config` is used. `model` None: no weights there."""

    config: Any
    spec: BaseSpec | None
    model: LoadedModel | None

    @property
    def decoder_only(self) -> BaseSpec:
        """The spec, where the format needs a decoder-only base."""
        if self.spec is None:
            raise ConversionRefused(
                f"the base is a {self.config.model_type}, an encoder-decoder; this format needs a causal LM"
            )
        return self.spec


def load_base(directory: Path) -> Base:
    """Raises `ConversionRefused` with the trait that the base can not be served for."""
    try:
        config: Any = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConversionRefused(f"--base {directory}: no readable config.json: {error}") from None
    if config.is_encoder_decoder:
        return Base(config, None, None)
    try:
        check_config(config)
        if any(directory.glob("*.safetensors")):
            model = load_model(directory, device=torch.device("cpu"))
            spec = base_spec(model, tokenizer_fingerprint=_tokenizer_fingerprint(directory))
            return Base(config, spec, model)
        return Base(config, _from_config(config, directory.resolve().name), None)
    except ModelRefused as refused:
        raise ConversionRefused(f"--base: {refused}") from None


def _tokenizer_fingerprint(directory: Path) -> str | None:
    """None where the directory has no tokenizer, or none that can be read."""
    if not any(directory.glob("tokenizer*")):
        return None
    try:
        return Tokenizer.load(directory).fingerprint()
    except (OSError, ValueError):
        return None


def _from_config(config: Any, model_id: str) -> BaseSpec:
    """The layout without weights; no fingerprint and no rotation, which need them."""
    try:
        with torch.device("meta"):  # bfloat16: some expert layers have no other on this device
            module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model = adopt_model(module, model_id=model_id)
    except (RuntimeError, NotImplementedError):
        raise ConversionRefused(
            f"--base: the layout of a {config.model_type} can not be told from its config.json alone; "
            "give a directory that holds its weights (*.safetensors)"
        ) from None
    return BaseSpec(
        model_id=model_id,
        model_type=model.model_type,
        layout=model.layout,
        position_limit=model.position_limit,
        position_scheme=model.position_scheme,
        rope_theta=model.rope_theta,
        vocab_size=model.vocab_size,
        fingerprint="",
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
    )
