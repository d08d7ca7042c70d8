"""The fingerprints of a base model: which model a prefix was trained on.

A prefix loads without complaint on any model of the same shape and then produces nonsense; names and
revisions do not help, since they can be wrong. So three things are told apart, and a refusal can name the one
that differs: the weights, the settings that change what the same weights compute, and the tokenizer. Each is
a fixed sample, read in well under a second. Called at start-up by the server and by trainers, on the thread
that loaded the model. Knows nothing of transformers: it reads plain attributes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import torch

from prefix_store.spec import BaseModelRef

SAMPLES_PER_TENSOR: Final = 64
SAMPLED_TOKENS: Final = 1024

# Settings that no weight shows. A list of names and not the whole config: later releases of transformers
# add fields, which must not make another model of a stored one.
_COMPUTED_WITH: Final = (
    "activation_function",
    "alibi",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "do_layer_norm_before",
    "embedding_multiplier",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "logit_scale",
    "logits_scaling",
    "max_window_layers",
    "model_type",
    "moe_intermediate_size",
    "n_group",
    "norm_eps",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "parallel_residual",
    "partial_rotary_factor",
    "qk_layernorm",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "rotary_dim",
    "rotary_pct",
    "routed_scaling_factor",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "sliding_window_pattern",
    "swiglu_limit",
    "tie_word_embeddings",
    "topk_group",
    "use_parallel_residual",
    "use_qk_norm",
    "use_sliding_window",
)

# Case, digits, spaces, punctuation, code, other scripts, and an emoji of several code points.
_SENTENCES: Final = (
    "The quick brown fox, aged 1234567, jumps over  two lazy dogs!",
    "  leading spaces\tand\ttabs\n\nnew lines\n",
    "def f(x): return {'a': [x**2, -1.5e-3]}  # naïve café",
    "Привет, мир. 你好，世界。 안녕하세요 مرحبا",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 <s> </s> <|endoftext|> [PAD]",
)


def base_fingerprint(model: torch.nn.Module) -> str:
    """`sha256:<hex>` over name, shape and up to 64 values of every named parameter.

    Values are rounded to bfloat16 first, so that float32 and bfloat16 loads of the same weights agree. A float32
    checkpoint that is loaded as float16 was rounded on the way, and differs.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(f"{name}{list(parameter.shape)}\0".encode())
        sha.update(_sample(parameter.detach()))
    return f"sha256:{sha.hexdigest()}"


def config_fingerprint(config: Any) -> str:
    """`sha256:<hex>` over the settings of a transformers config that change what its model computes.

    A field that is missing and one that is None are the same.
    """
    found = {name: getattr(config, name, None) for name in _COMPUTED_WITH}
    present = {name: _plain(value) for name, value in found.items() if value is not None}
    text = json.dumps(present, sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _plain(value: Any) -> Any:
    """The same setting however it was written: 10000 and 10000.0 are one theta."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """`sha256:<hex>` over how a transformers tokenizer behaves: its size, a sample of its tokens, and a few
    sentences as it encodes them, special tokens included."""
    size = len(tokenizer)
    step = max(size // SAMPLED_TOKENS, 1)
    tokens = tokenizer.convert_ids_to_tokens(list(range(0, size, step)))
    encoded = [list(tokenizer(sentence)["input_ids"]) for sentence in _SENTENCES]
    text = json.dumps([size, [str(token) for token in tokens], encoded])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def base_model_ref(
    model: Any, tokenizer: Any = None, *, model_id: str | None = None
) -> BaseModelRef:
    """How an artifact names the transformers `model` (and tokenizer) that its prefix was made on."""
    config = model.config.get_text_config()
    return BaseModelRef(
        id=model_id,
        fingerprint=base_fingerprint(model),
        config_fingerprint=config_fingerprint(config),
        tokenizer_fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        vocab_size=config.vocab_size,
    )


def _sample(tensor: torch.Tensor) -> bytes:
    """Values spread evenly over the tensor, first and last among them, as bfloat16 bytes."""
    flat = tensor.reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    # Integers: a float step loses whole positions beyond 2^24 elements.
    indices = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
    sample = flat[indices.to(flat.device)].to(torch.bfloat16).cpu()
    return sample.view(torch.uint8).numpy().tobytes()
