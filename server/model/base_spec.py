"""What the store must know of a loaded model. Runs once at start; called by `server.bootstrap`."""

from __future__ import annotations

from typing import Any

from prefix_store.fingerprint import base_fingerprint, config_fingerprint
from prefix_store.spec import BaseSpec
from server.model.loader import LoadedModel
from server.model.rotary import find_rotary


def base_spec(model: LoadedModel, *, tokenizer_fingerprint: str | None = None) -> BaseSpec:
    """Geometry, positions and fingerprints of `model`; runs it once on two tokens."""
    config: Any = model.module.config
    return BaseSpec(
        model_id=model.model_id,
        model_type=model.model_type,
        layout=model.layout,
        position_limit=model.position_limit,
        position_scheme=model.position_scheme,
        rope_theta=model.rope_theta,
        vocab_size=model.vocab_size,
        fingerprint=base_fingerprint(model.module),
        config_fingerprint=config_fingerprint(config.get_text_config()),
        tokenizer_fingerprint=tokenizer_fingerprint,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        rotary=find_rotary(model) if model.position_scheme == "rope" else None,
    )
