"""Operators that `torch.compile` calls without looking into them: attention, and prepacked linear layers.

Registered with torch when this module is imported; they run on the engine thread, inside of compiled layers. An
operator is told whose work it does by a *handle*, a tensor without dimensions on the host that holds a module's
number. As a number it would be a constant, and each layer would be compiled for itself; as a tensor it is an input
like any other, and one compiled layer serves all. Pools and prepacked weights are found through the module and
never enter a graph, so neither their shapes nor that they are written to concern the compiler.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Final

import torch
from torch import Tensor, nn

_LIBRARY: Final[Any] = torch.library.Library("prefixd", "FRAGMENT")  # type: ignore[no-untyped-call] # torch has no types for it
_modules: Final[weakref.WeakValueDictionary[int, nn.Module]] = weakref.WeakValueDictionary()
_numbers: Final = itertools.count()

_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor handle, float? scaling, int? sliding_window, "
    "float? softcap, Tensor? s_aux) -> Tensor"
)
_LIBRARY.define("prepacked_linear(Tensor x, Tensor handle, int out_features) -> Tensor")


def give_handle(module: nn.Module) -> None:
    """Makes `module` known to the operators, as long as it lives."""
    if getattr(module, "prefixd_handle", None) is None:
        number = next(_numbers)
        _modules[number] = module
        module.prefixd_handle = torch.tensor(number)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Tensor:
    """For graphs: what `module.prefixd_attention` gives, [1, T, Hq, Dv]; `options` as transformers passes them."""
    out: Tensor = torch.ops.prefixd.attend(
        query,
        key,
        value,
        module.prefixd_handle,
        options.get("scaling"),
        options.get("sliding_window"),
        options.get("softcap"),
        options.get("s_aux"),
    )
    return out


def prepacked_linear(module: nn.Module, x: Tensor, out_features: int) -> Tensor:
    """For graphs: what `module` gives for x [..., in], [..., out_features]."""
    out: Tensor = torch.ops.prefixd.prepacked_linear(x, module.prefixd_handle, out_features)
    return out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    module = _modules[int(handle)]
    out: Tensor
    out, _ = module.prefixd_attention(  # type: ignore[operator] # a module's attribute may be anything
        module,
        query,
        key,
        value,
        None,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        s_aux=s_aux,
    )
    return out.contiguous()  # as the compiler was promised


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:  # noqa: ARG001 - the operator's signature
    """The shape of the result, for the compiler."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _linear(x: Tensor, handle: Tensor, out_features: int) -> Tensor:  # noqa: ARG001 - the operator's signature
    out: Tensor = _modules[int(handle)](x)
    return out


def _multiplied(x: Tensor, handle: Tensor, out_features: int) -> Tensor:  # noqa: ARG001 - the operator's signature
    """The shape of the result, for the compiler."""
    return x.new_empty(*x.shape[:-1], out_features)


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("prepacked_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("prefixd::attend", _attended, lib=_LIBRARY)
torch.library.register_fake("prefixd::prepacked_linear", _multiplied, lib=_LIBRARY)
