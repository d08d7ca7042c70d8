"""What is trained: the parameters behind a prefix, and how they become its keys and values.

    DirectEncoder   the keys and values themselves
    MlpEncoder      Li & Liang's reparameterization: embedding -> linear -> tanh -> linear to all layers' keys and
                    values, on top of the initial prefix; folded away at export
    SoftEncoder     prompt tuning: embeddings at the input layer, which the base turns into keys and values

Parameters are float32 whatever the base runs in. Main thread; made by `build_encoder`, run by `loop` once a step.
`forward` gives the whole prefix; in training mode with dropout, in eval mode exactly what is exported.

P = prefix tokens, F = leading rows that stay as they began, H = key/value heads, D = head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from trainer.base import FrozenBase
from trainer.config import TrainConfig
from trainer.initial import InitialPrefix
from trainer.prefix_cache import KeyValues


class PrefixEncoder(nn.Module, ABC):
    """Rows 0..F-1 never change: a first token that much attention rests on can be kept as it is.

    Dropout zeroes single values of the other rows, drawn by `generator`, which belongs to a checkpoint.
    """

    def __init__(self, num_frozen: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.num_frozen = num_frozen
        self.dropout = dropout
        self.generator = generator

    def forward(self) -> KeyValues:
        """The prefix, P rows, in the dtype of the parameters."""
        rows = self.rows()
        if not (self.training and self.dropout):
            return rows
        return KeyValues.of([self._dropped(tensor) for tensor in rows.tensors])

    @abstractmethod
    def rows(self) -> KeyValues:
        """All P rows, without dropout."""

    def _dropped(self, tensor: Tensor) -> Tensor:
        keep = 1.0 - self.dropout
        mask = torch.empty_like(tensor).bernoulli_(keep, generator=self.generator) / keep
        mask[: self.num_frozen] = 1.0
        return tensor * mask


class DirectEncoder(PrefixEncoder):
    """Keys and values are the parameters, each tensor in units of its own initial size.

    Layers differ in size, values of the first by a factor of ten and more; Adam moves every parameter by about the
    learning rate, which is then one share of each. `in_units` False: the bare numbers, as PEFT has them.
    """

    def __init__(
        self,
        initial: KeyValues,
        num_frozen: int,
        dropout: float,
        generator: torch.Generator,
        *,
        in_units: bool = True,
    ) -> None:
        super().__init__(num_frozen, dropout, generator)
        tensors = [tensor.detach().float() for tensor in initial.tensors]  # [P, H, D]
        units = _units(tensors, apply=in_units)
        self.frozen = _Buffers([t[:num_frozen].clone() for t in tensors])
        self.units = _Buffers(units)
        self.learned = nn.ParameterList(
            [nn.Parameter(t[num_frozen:] / unit) for t, unit in zip(tensors, units, strict=True)]
        )

    def rows(self) -> KeyValues:
        learned = [p * unit for p, unit in zip(self.learned, self.units.tensors, strict=True)]
        return _joined(self.frozen.tensors, learned)


class MlpEncoder(PrefixEncoder):
    """`initial + outer(tanh(inner(embedding)))`, outer zero at the start: step 0 is the initial prefix exactly.

    What the MLP adds is in units of the initial sizes, as the direct parameters are. `from_scratch`: no initial
    prefix under it, no units, and torch's own initial weights, as the paper begins without a text.
    """

    def __init__(
        self,
        initial: KeyValues,
        num_frozen: int,
        dropout: float,
        generator: torch.Generator,
        *,
        embedding_size: int,
        hidden_size: int,
        seed: int,
        from_scratch: bool = False,
    ) -> None:
        super().__init__(num_frozen, dropout, generator)
        tensors = [tensor.detach().float() for tensor in initial.tensors]
        self.frozen = _Buffers([t[:num_frozen].clone() for t in tensors])
        self.initial = _Buffers([t[num_frozen:].clone() * (not from_scratch) for t in tensors])
        self.units = _Buffers(_units(tensors, apply=not from_scratch))
        self._sizes = [t[0].numel() for t in tensors]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            count = initial.num_virtual_tokens - num_frozen
            self.embedding = nn.Parameter(torch.randn(count, embedding_size))
            self.inner = nn.Linear(embedding_size, hidden_size)
            self.outer = nn.Linear(hidden_size, sum(self._sizes))
        if not from_scratch:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
        self.to(tensors[0].device)

    def rows(self) -> KeyValues:
        flat = self.outer(torch.tanh(self.inner(self.embedding)))  # [P - F, sum of H * D]
        parts = flat.split(self._sizes, dim=1)
        starts = zip(self.initial.tensors, self.units.tensors, parts, strict=True)
        learned = [start + unit * part.view_as(start) for start, unit, part in starts]
        return _joined(self.frozen.tensors, learned)


class SoftEncoder(PrefixEncoder):
    """Embeddings `[P, hidden]`. One pass of the base over them gives what every row of a batch would compute."""

    def __init__(
        self,
        base: FrozenBase,
        embeddings: Tensor,
        num_frozen: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(num_frozen, dropout, generator)
        self._run = (
            base.key_values
        )  # the bound method: a module would become part of the checkpoint
        self._dtype = base.dtype
        self.frozen = _Buffers([embeddings[:num_frozen].float().clone()])
        self.learned = nn.Parameter(embeddings[num_frozen:].float().clone())

    def rows(self) -> KeyValues:
        embeddings = torch.cat([*self.frozen.tensors, self.learned])
        found = self._run(embeddings.to(self._dtype))
        return KeyValues.of([tensor.to(embeddings.dtype) for tensor in found.tensors])


class _Buffers(nn.Module):
    """Tensors that belong to the state and are not trained."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_buffer(str(index), tensor)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.buffers())


def _units(tensors: list[Tensor], *, apply: bool) -> list[Tensor]:
    """Root of the mean square of each, a scalar; 1 for a tensor of zeros, and for all if not `apply`."""
    sizes = [tensor.square().mean().sqrt() if apply else tensor.new_ones(()) for tensor in tensors]
    return [torch.where(size > 0, size, torch.ones_like(size)) for size in sizes]


def _joined(frozen: list[Tensor], learned: list[Any]) -> KeyValues:
    return KeyValues.of([torch.cat(pair) for pair in zip(frozen, learned, strict=True)])


def build_encoder(base: FrozenBase, config: TrainConfig, initial: InitialPrefix) -> PrefixEncoder:
    """The encoder that `config` names, beginning at `initial`."""
    generator = torch.Generator(base.device)
    generator.manual_seed(config.seed)
    common = (config.num_frozen_tokens, config.prefix_dropout, generator)
    match config.encoder:
        case "direct":
            return DirectEncoder(initial.key_values, *common)
        case "mlp":
            return MlpEncoder(
                initial.key_values,
                *common,
                embedding_size=config.mlp_embedding_size,
                hidden_size=config.mlp_hidden_size,
                seed=config.seed,
                from_scratch=config.init == "random",
            )
        case "soft":
            return SoftEncoder(base, initial.embeddings, *common)
