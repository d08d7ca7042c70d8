"""Greedy decoding by transformers with a learned prefix as ``past_key_values``.

Called by the evaluation and the tests. It is the plain reference: the prefix is put into a
``DynamicCache`` and the request's tokens take the positions after it.

Shapes: L layers, B rows, P prefix tokens, H key/value heads, D head size, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase

from demo.build.tokenizer import encode

ROWS_AT_ONCE: Final = 50
TENSOR_NAME: Final = "dec_self.{layer:03d}.{kind}"


def load_prefix(path: Path) -> torch.Tensor:
    """The artifact's tensors as one ``[L, 2, P, H, D]`` fp32 tensor."""
    tensors = load_file(path)
    layers = [
        torch.stack([tensors[TENSOR_NAME.format(layer=layer, kind=kind)] for kind in ("k", "v")])
        for layer in range(len(tensors) // 2)
    ]
    return torch.stack(layers).float()


def prefix_cache(prefix: torch.Tensor, num_rows: int) -> DynamicCache:
    """A cache that begins with the prefix, for ``num_rows`` requests. Gradients flow through it."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix.transpose(2, 3)):  # [L, 2, H, P, D]
        cache.update(key.expand(num_rows, -1, -1, -1), value.expand(num_rows, -1, -1, -1), layer)
    return cache


@torch.inference_mode()
def greedy(
    model: LlamaForCausalLM, prompts: Sequence[list[int]], prefix: torch.Tensor | None, limit: int
) -> list[list[int]]:
    """The new tokens of every prompt, without EOS, at most ``limit``."""
    outputs: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(by_length), ROWS_AT_ONCE):
        chosen = by_length[start : start + ROWS_AT_ONCE]
        new = greedy_batch(model, [prompts[row] for row in chosen], prefix, limit)
        for row, tokens in zip(chosen, new, strict=True):
            outputs[row] = tokens
    return outputs


def greedy_batch(
    model: LlamaForCausalLM, prompts: list[list[int]], prefix: torch.Tensor | None, limit: int
) -> list[list[int]]:
    """Prompts are padded on the right; padding is masked, and positions skip it."""
    eos = model.generation_config.eos_token_id
    past = 0 if prefix is None else prefix.shape[2]
    cache = DynamicCache() if prefix is None else prefix_cache(prefix, len(prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    ids = torch.tensor([prompt + [eos] * (width - len(prompt)) for prompt in prompts])
    seen = torch.arange(past + width) < (past + lengths)[:, None]  # [B, past + T]
    positions = torch.arange(past, past + width).expand(len(prompts), -1)
    last = lengths - 1
    done = torch.zeros(len(prompts), dtype=torch.bool)
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in range(limit):
        logits = model(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
        token = logits[torch.arange(len(prompts)), last].argmax(-1)
        done |= token == eos
        if bool(done.all()):
            break
        for row in (~done).nonzero().flatten().tolist():
            outputs[row].append(int(token[row]))
        ids, last = token[:, None], torch.zeros_like(last)
        positions = (past + lengths + step)[:, None]
        seen = torch.cat([seen, torch.ones(len(prompts), 1, dtype=torch.bool)], dim=1)
    return outputs


def complete(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    prefix: torch.Tensor | None,
    limit: int,
) -> list[str]:
    """The decoded completions; each begins with a space."""
    new = greedy(model, [encode(tokenizer, prompt) for prompt in prompts], prefix, limit)
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in new]
