"""Linear layers that read the same tensor, as one product: queries, keys and values; gate and up.

Called once at start by `server.bootstrap`, on the main thread, after the fingerprints were taken and before
`prepack`. Which layers they are is seen and not known: one forward pass of two tokens notes which linear layers
of a module are called once each, with the very same tensor. So there is no code per architecture, and
transformers' modules stay as they are: in each layer's place stands a `MergedPart`, the first of which computes
the product of all.

Not for training: a product is kept between two calls. Experts whose weights are no linear layers stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from server.errors import ModelRefused
from server.model.loader import LoadedModel
from server.model.pack_shape import LANES
from server.model.trial_pass import TrialPass

logger = logging.getLogger(__name__)

# Largest difference to the layers by themselves, relative to the largest value: another order of sums.
_TOLERANCE: Final = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class MergedLinear(nn.Module):
    """Several linear layers of one input: x [..., in] -> one [..., out] for each, in the order of their calls.

    Invariant: what is kept between two calls belongs to the input that is kept with it, and the last part drops both.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.linear = _joined(layers)
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` gives for `x`, whoever asks in whatever order; computed once if asked as expected."""
        if index == 0 or x is not self._input:
            self._input, self._parts = x, self._product(x)
        found = self._parts[index]
        if index == len(self.sizes) - 1:
            self._input, self._parts = None, ()
        return found

    def _product(self, x: Tensor) -> tuple[Tensor, ...]:
        # A row that is no whole number of vectors must not be read in place: see `pack_shape`.
        parts = self.linear(x).split(self.sizes, dim=-1)
        return tuple(part if part.shape[-1] % LANES == 0 else part.contiguous() for part in parts)


class MergedPart(nn.Module):
    """Stands where one of the layers stood."""

    def __init__(self, merged: MergedLinear, index: int) -> None:
        super().__init__()
        self.merged = merged
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.merged.part(self.index, x)


def _joined(layers: list[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all, one behind the other."""
    weight = torch.cat([layer.weight.data for layer in layers])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if any(layer.bias is not None for layer in layers):
        biases = [
            weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.data
            for layer in layers
        ]
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


@torch.no_grad()
def merge_linears(model: LoadedModel) -> LoadedModel:
    """The model with such layers merged in place, module by module. Raises `ModelRefused` if its numbers change.

    Its parameters get other names, and nothing can be trained through it afterwards.
    """
    calls = _Calls()
    with calls.noted(model.module):
        before = TrialPass.of(model)
    groups = list(calls.groups())
    if not groups:
        return model
    for parent, names in groups:
        merged = MergedLinear([getattr(parent, name) for name in names])
        for index, name in enumerate(names):
            setattr(parent, name, MergedPart(merged, index))
    difference = TrialPass.of(model).difference(before)
    if not difference <= _TOLERANCE[model.layout.dtype]:
        raise ModelRefused(
            f"{model.model_type}: with merged linear layers its numbers differ by {difference:.2g} "
            f"(relative; at most {_TOLERANCE[model.layout.dtype]} expected)"
        )
    num_layers = sum(len(names) for _, names in groups)
    logger.info("merged %d linear layers into %d", num_layers, len(groups))
    return model


@dataclass
class _Call:
    """A linear layer's call: the tensor itself, which stays alive here, and what was in it."""

    parent: nn.Module
    name: str
    x: Tensor
    content: Tensor


@dataclass
class _Calls:
    """Which linear layers were called with what."""

    _calls: list[_Call] = field(default_factory=list)

    @contextlib.contextmanager
    def noted(self, module: nn.Module) -> Iterator[None]:
        """Notes the calls of ordinary linear layers meanwhile."""
        hooks = [
            child.register_forward_pre_hook(functools.partial(self._note, parent, name))
            for parent, name, child in _candidates(module)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, parent: nn.Module, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._calls.append(_Call(parent, name, inputs[0], inputs[0].clone()))

    def groups(self) -> Iterator[tuple[nn.Module, list[str]]]:
        """Modules, and the names of their layers that may be merged, in the order of the calls."""
        num_calls = Counter((id(call.parent), call.name) for call in self._calls)
        together: dict[tuple[int, int], list[_Call]] = {}
        for call in self._calls:
            if num_calls[id(call.parent), call.name] == 1:
                together.setdefault((id(call.parent), id(call.x)), []).append(call)
        for calls in together.values():
            unchanged = all(torch.equal(call.content, calls[0].content) for call in calls)
            if len(calls) > 1 and unchanged:
                yield calls[0].parent, [call.name for call in calls]


def _candidates(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Ordinary linear layers in one place, with weights that nobody else has: parent, name, layer."""
    holders = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    places = Counter(id(child) for parent in module.modules() for child in parent.children())
    for parent in module.modules():
        for name, child in parent.named_children():
            # A subclass may compute something else.
            if type(child) is nn.Linear and places[id(child)] == holders[id(child.weight)] == 1:
                yield parent, name, child
