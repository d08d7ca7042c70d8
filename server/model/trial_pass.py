"""A forward pass without a KV pool: shows what a model computes before and after it is rebuilt for speed.

Runs once or twice at start, on the main thread, before the engine owns the model; called by `merged_linear` and
`compiled_layers`. Attention is so simple here that whatever is wrong before it shows behind it.

T = tokens of the pass, Hq = query heads, H = kv heads, D = head dim, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from server.model.loader import LoadedModel


@dataclass
class TrialPass:
    """`tensors`: queries [1, Hq, T, D], keys and values [1, H, T, D] of each layer in order, then logits [T, V];
    `modules`: who called attention, in order."""

    tensors: list[Tensor] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    @classmethod
    def of(cls, model: LoadedModel, num_tokens: int = 2) -> TrialPass:
        """Runs the model once on `num_tokens` tokens; attention is as before afterwards."""
        found = cls()
        places = torch.arange(num_tokens, device=model.device)
        with model.connected(found._attention):
            logits = model.logits((places % model.vocab_size)[None], places[None], places)
        found.tensors.append(logits)
        return found

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """Gives each token its own value [1, T, Hq, D]."""
        self.modules.append(module)
        self.tensors += [query.clone(), key.clone(), value.clone()]
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2), None

    def difference(self, other: TrialPass) -> float:
        """The largest to another pass of as many tokens, each tensor's relative to its largest value."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return max(
            float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6))
            for a, b in pairs
        )
