"""Proves at load that the engine's path gives the model's own numbers.

One random prefix and prompts go through our packed path, chunked and mixed, and through the model's eager
attention with the same prefix as `past_key_values`. A difference means that the architecture does
something the packed path loses; the model is then refused instead of served wrongly.

Runs once, on the main thread, before the engine starts; called by `server.bootstrap`. Takes two small
forward passes and a pool of a few blocks.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from prefix_store.artifact import Prefix
from prefix_store.spec import KVLayout, PrefixManifest
from server.engine.messages import ScheduledRow
from server.engine.sequence import Sequence
from server.errors import ModelRefused
from server.kvcache.kv_cache import KVCache
from server.model.attention.base import AttentionBackend, PagedAttention
from server.model.loader import ATTENTION_NAME, LoadedModel
from server.model.runner import ModelRunner
from server.types import GenerationRequest, SamplingParams

_P: Final = 5  # virtual tokens of the trial prefix: no multiple of the block size
_BLOCK_SIZE: Final = 4
_PROMPT_LEN: Final = 7
# Largest difference of logits, relative to their largest value. The packed path only reorders sums.
_TOLERANCE: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}


def self_check(model: LoadedModel, backend: AttentionBackend) -> float:
    """Largest relative difference found. Raises `ModelRefused` above the tolerance of the dtype."""
    generator = torch.Generator().manual_seed(0)
    prefix = _random_prefix(model.layout, generator)
    prompt = torch.randint(0, model.vocab_size, (_PROMPT_LEN,), generator=generator).tolist()
    ours = _packed_logits(model, backend, prefix, prompt)
    theirs = _eager_logits(model, prefix, prompt)
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not difference <= _TOLERANCE[model.layout.dtype]:
        raise ModelRefused(
            f"{model.model_type}: logits through packed attention differ from the model's own by "
            f"{difference:.2g} (relative; at most {_TOLERANCE[model.layout.dtype]} expected). "
            "It does something in attention that prefixd does not reproduce."
        )
    return difference


def _random_prefix(layout: KVLayout, generator: torch.Generator) -> Prefix:
    dtype = getattr(torch, layout.dtype)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(_P, heads, dim, generator=generator).to(dtype)

    return Prefix(
        digest="sha256:self-check",
        manifest=PrefixManifest(num_virtual_tokens=_P, k_space="none", model_type="self-check"),
        keys=tuple(draw(layer.num_kv_heads, layer.key_dim) for layer in layout.layers),
        values=tuple(draw(layer.num_kv_heads, layer.value_dim) for layer in layout.layers),
    )


def _packed_logits(
    model: LoadedModel, backend: AttentionBackend, prefix: Prefix, prompt: list[int]
) -> Tensor:
    """Logits [3, V]: after the prompt with the prefix, one decode step later, and without the prefix."""
    cache = KVCache(model.layout, num_blocks=10, block_size=_BLOCK_SIZE, device=model.device)
    attention = PagedAttention(backend, cache)
    model.connect(attention)
    runner = ModelRunner(model, cache, attention)
    prefix_blocks, with_prefix, without = (1, 2), (3, 4, 5), (6, 7, 8)
    with torch.inference_mode():
        cache.write_prefix(prefix_blocks, prefix)
    head, middle, last = prompt[:3], prompt[3:-1], prompt[-1:]
    runner.forward((_row(head, 0, prefix_blocks, with_prefix, sample=False),))
    first = runner.forward(
        (
            _row(middle, 3, prefix_blocks, with_prefix),
            _row(prompt, 0, (), without),
        )
    )
    second = runner.forward((_row(last, len(prompt) - 1, prefix_blocks, with_prefix),))
    return torch.stack([first[0], second[0], first[1]]).float().cpu()


def _row(
    tokens: list[int],
    start: int,
    prefix_blocks: tuple[int, ...],
    blocks: tuple[int, ...],
    *,
    sample: bool = True,
) -> ScheduledRow:
    num_virtual_tokens = _P if prefix_blocks else 0
    request = GenerationRequest("self-check", tuple(tokens), SamplingParams())
    return ScheduledRow(
        sequence=Sequence(request, index=0, seed=0, arrival=0.0),
        token_ids=tuple(tokens),
        start=start,
        prefix_block_ids=prefix_blocks,
        num_virtual_tokens=num_virtual_tokens,
        first_position=num_virtual_tokens,
        block_ids=blocks,
        sample=sample,
    )


@torch.inference_mode()
def _eager_logits(model: LoadedModel, prefix: Prefix, prompt: list[int]) -> Tensor:
    """The same three logits from the model's own eager attention and transformers' cache."""
    module: Any = model.module
    module.set_attn_implementation("eager")
    try:
        ids = torch.tensor([prompt], device=model.device)
        positions = torch.arange(len(prompt), device=model.device)[None]
        cached = module(
            input_ids=ids,
            position_ids=positions + _P,
            past_key_values=_as_cache(prefix, model.device),
            use_cache=True,
        ).logits[0]
        plain = module(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    finally:
        module.set_attn_implementation(ATTENTION_NAME)
    return torch.stack([cached[-2], cached[-1], plain[-1]]).float().cpu()


def _as_cache(prefix: Prefix, device: torch.device) -> DynamicCache:
    """A prefix as transformers has it: per layer [1, H, P, D]."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(
            keys.transpose(0, 1)[None].to(device), values.transpose(0, 1)[None].to(device), layer
        )
    return cache
