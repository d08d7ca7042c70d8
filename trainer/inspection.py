"""What a prefix looks like from outside: how large it is, how far it moved, how much attention it gets.

Called by `loop` at each evaluation, on the main thread; the numbers go into the log as `prefix` records, for the
plots and the doctor. Looks at a few held-out examples only, one at a time: a matrix of attention is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from prefix_store.norms import layer_norms
from trainer.base import FrozenBase
from trainer.batches import make_batch
from trainer.encoding import EncodedExample
from trainer.prefix_cache import KeyValues
from trainer.records import PrefixRecord

NUM_EXAMPLES: Final = 4
_MAX_TOKENS: Final = 1024
_SINKS: Final = (
    4  # the first tokens of a text have keys and values unlike all others in many models
)


class Inspection:
    """Looks at one run's prefix, again and again. Runs the base once on its examples when it is made."""

    def __init__(
        self, base: FrozenBase, initial: KeyValues, held_out: Sequence[EncodedExample]
    ) -> None:
        self._base = base
        self._initial = initial
        shortest_first = sorted(held_out, key=lambda example: example.num_tokens)
        fitting = [e for e in held_out if e.num_tokens <= _MAX_TOKENS]
        self._examples = (fitting or shortest_first)[:NUM_EXAMPLES]
        self._natural = self._natural_norms()

    @torch.no_grad()
    def look(self, step: int, prefix: KeyValues) -> PrefixRecord:
        """One number a layer of each kind."""
        norms = layer_norms(prefix.keys, prefix.values)
        masses = self._attention(prefix)
        return {
            "kind": "prefix",
            "step": step,
            "key_norms": [layer.key for layer in norms],
            "value_norms": [layer.value for layer in norms],
            "natural_key_norms": self._natural[0],
            "natural_value_norms": self._natural[1],
            "attention_mass": [on_prefix for on_prefix, _ in masses],
            "sink_mass": [on_first for _, on_first in masses],
            "moved_keys": _moved(self._initial.keys, prefix.keys),
            "moved_values": _moved(self._initial.values, prefix.values),
        }

    @torch.no_grad()
    def _natural_norms(self) -> tuple[list[float], list[float]]:
        """Of the examples' own tokens without a prefix, but the first ones of each."""
        found = []
        for example in self._examples:
            tokens = (*example.prompt_token_ids, *example.completion_token_ids)
            own = self._base.key_values(torch.tensor(tokens[:_MAX_TOKENS]))
            start = _SINKS if own.num_virtual_tokens > 2 * _SINKS else 0
            found.append(own.rows(start, own.num_virtual_tokens))
        joined = [torch.cat(parts) for parts in zip(*(f.tensors for f in found), strict=True)]
        together = KeyValues.of(joined)
        norms = layer_norms(together.keys, together.values)
        return [layer.key for layer in norms], [layer.value for layer in norms]

    def _attention(self, prefix: KeyValues) -> list[tuple[float, float]]:
        """Per layer: mean probability on the prefix, and on its first row, where completions are predicted."""
        num_layers = len(prefix.keys)
        sums = [(0.0, 0.0)] * num_layers
        for example in self._examples:
            found = self._attention_of(prefix, example)
            sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, found, strict=True)]
        return [(a / len(self._examples), b / len(self._examples)) for a, b in sums]

    def _attention_of(
        self, prefix: KeyValues, example: EncodedExample
    ) -> list[tuple[float, float]]:
        batch = make_batch([example], self._base.device)
        count = prefix.num_virtual_tokens
        found: dict[int, tuple[float, float]] = {}

        def note(module: nn.Module, _: Any, output: Any) -> None:
            if not _gives_probabilities(output):
                return
            weights: Tensor = output[1][0][:, batch.columns]  # [heads, N, P + T]
            mass = float(weights[..., :count].sum(-1).mean())
            found[int(module.layer_idx)] = (mass, float(weights[..., 0].mean()))  # type: ignore[arg-type]

        handles = [
            module.register_forward_hook(note)
            for module in self._base.module.modules()
            if hasattr(module, "layer_idx")
        ]
        try:
            with self._base.attention_implementation("eager"):
                self._base.logits(prefix, batch)
        finally:
            for handle in handles:
                handle.remove()
        return [found[layer] for layer in range(len(prefix.keys))]


def _gives_probabilities(output: Any) -> bool:
    """Whether this is what transformers' eager attention modules give: the output, and [B, heads, T, P + T]."""
    return (
        isinstance(output, tuple)
        and len(output) > 1
        and isinstance(output[1], Tensor)
        and output[1].dim() == 4
    )


def _moved(before: Sequence[Tensor], now: Sequence[Tensor]) -> list[float]:
    """L2 distance from the initial tensor, over its own norm."""
    return [
        float((b - a.float()).norm() / a.float().norm().clamp_min(1e-12))
        for a, b in zip(before, now, strict=True)
    ]
