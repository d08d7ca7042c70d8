"""Tiny random models of each architecture that the parity tests cover, made in milliseconds.

Sizes are small but not symmetric: several kv heads share query heads, head dims differ from hidden/heads,
windows are shorter than the longest prefix. Called by tests only.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB: Final = 199
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA: Final = _COMMON | {"num_key_value_heads": 2}
_GEMMA: Final = _GQA | {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}
_GPT2: Final = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: Final[dict[str, dict[str, Any]]] = {
    "llama": _GQA,
    "qwen2": _GQA,
    "qwen3": _GQA | {"head_dim": 16},
    "mistral": _GQA | {"sliding_window": 24},
    "gemma": _GQA | {"head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "ffn_dim": 80,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 48,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "phi3": _GQA,
    "gpt_neox": _COMMON,
    "olmo2": _GQA,
    "gpt_oss": _GQA
    | {
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def tiny_model(architecture: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random float32 causal LM with eager attention, weights large enough to give distinct tokens."""
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES[architecture] | overrides))
    torch.manual_seed(seed)
    with contextlib.redirect_stderr(io.StringIO()):
        logging.disable(logging.WARNING)
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        logging.disable(logging.NOTSET)
    # The default 0.02 leaves logits almost equal, so that greedy decoding would test rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.eval()
