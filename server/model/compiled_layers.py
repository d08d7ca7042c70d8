"""Decoder layers compiled by `torch.compile`, one graph for all layers of a kind and for every number of tokens.

Called once at start by `server.bootstrap` if it was asked for (`--compile`), on the main thread, when the model is
merged and prepacked and before the self-check, which then judges what will serve. Only layers are compiled, not the
model: that takes seconds instead of minutes, and a graph that is captured around the model needs no more.

What can not be compiled is served as it was, with a warning. When the layers have been compiled nothing is compiled
any more: a call that no graph fits (one token alone in a pack, or transformers' own attention) runs uncompiled, so
that no request waits for a compiler.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from server.errors import ConfigError
from server.model.loader import LoadedModel
from server.model.opaque_ops import give_handle
from server.model.prepacked_linear import PrepackedLinear
from server.model.trial_pass import TrialPass

logger = logging.getLogger(__name__)

# The compiler makes a graph of its own for a single token; two of them take no longer.
_MIN_TOKENS: Final = 2
_TRIAL_TOKENS: Final = 37
_REASON_LEN: Final = 300
# Largest difference to the uncompiled layers, relative: the compiler rounds less often, and sums in another order.
_TOLERANCE: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}

Backend = str | Callable[..., Any]


@torch.inference_mode()
def compile_layers(model: LoadedModel, *, backend: Backend = "inductor") -> LoadedModel:
    """The model with its layers compiled, or as it was, with a warning, where that is not possible.

    Raises `ConfigError` if there is no compiler to do it with.
    """
    from torch._inductor import config as inductor  # slow, and only for those who compile

    if backend == "inductor":
        _require_compiler(model.device)
    shape = dataclasses.replace(
        model.pack_shape, min_tokens=max(_MIN_TOKENS, model.pack_shape.min_tokens)
    )
    padded = dataclasses.replace(model, pack_shape=shape)
    sizes = _trial_sizes(padded)
    plain = [TrialPass.of(model, size) for size in sizes]
    layers = _decoder_layers(model, plain[0].modules)
    if not layers:
        return _uncompiled(model, layers, "they do not stand in one stack")
    logger.info("compiling %d layers, which may take a minute", len(layers))
    begun, num_graphs = time.monotonic(), _num_graphs()
    try:
        _compile(model, layers, plain[0].modules, backend)
        # In this process alone: a pool of compiling ones would stay behind, idle.
        with inductor.patch(compile_threads=1):
            compiled = [TrialPass.of(model, size) for size in sizes]
    except Exception as error:  # noqa: BLE001 - whatever the compiler can not do, the server runs without it
        return _uncompiled(model, layers, f"they can not be compiled ({_in_short(error)})")
    difference = max(c.difference(p) for c, p in zip(compiled, plain, strict=True))
    if not difference <= _TOLERANCE[model.layout.dtype]:
        return _uncompiled(model, layers, f"compiled, their results differ by {difference:.2g}")
    for layer in layers:
        layer.forward = torch._dynamo.run(layer.forward)  # from now on what is compiled, or nothing
    logger.info(
        "compiled %d layers as %d graphs in %.0f s, relative difference %.1e",
        len(layers),
        _num_graphs() - num_graphs,
        time.monotonic() - begun,
        difference,
    )
    return padded


def _compile(
    model: LoadedModel, layers: list[nn.Module], callers: list[nn.Module], backend: Backend
) -> None:
    """Has each layer compiled when it is called next. `callers`: the modules that call attention."""
    packed = [m for m in model.module.modules() if isinstance(m, PrepackedLinear)]
    for module in (*callers, *packed):
        give_handle(module)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend=backend)


def _uncompiled(model: LoadedModel, layers: list[nn.Module], why: str) -> LoadedModel:
    for layer in layers:
        vars(layer).pop("forward", None)
    torch._dynamo.reset()
    logger.warning("%s: its layers stay uncompiled: %s", model.model_type, why)
    return model


def _in_short(error: Exception) -> str:
    """The beginning of a compiler's many lines."""
    return " ".join(str(error).split())[:_REASON_LEN] or type(error).__name__


def _num_graphs() -> int:
    """That this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _require_compiler(device: torch.device) -> None:
    if device.type != "cpu":
        return  # Triton compiles for a GPU; that it can, shows in the attempt
    from torch._inductor.cpp_builder import get_cpp_compiler  # likewise

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ConfigError(
            "--compile needs a C++ compiler on a CPU: install g++, or name one in CXX"
        ) from error


def _trial_sizes(model: LoadedModel) -> list[int]:
    """Two numbers of tokens that are no other size in the model: the compiler takes equal sizes for the same one."""
    taken = {size for parameter in model.module.parameters() for size in parameter.shape}
    taken |= set(model.pack_shape.widths)
    taken |= {size for layer in model.layout.layers for size in (layer.key_dim, layer.value_dim)}
    found: list[int] = []
    num_tokens = _TRIAL_TOKENS
    while len(found) < 2:
        num_tokens = model.pack_shape.padded(num_tokens)
        if num_tokens not in taken:
            found.append(num_tokens)
        num_tokens += 1
    return found


def _decoder_layers(model: LoadedModel, callers: list[nn.Module]) -> list[nn.Module]:
    """The stack whose every layer calls attention once; empty if there is none."""
    for stack in model.module.modules():
        alike = isinstance(stack, nn.ModuleList) and len(stack) == len(callers)
        if alike and all(
            c in set(x.modules()) for x, c in zip(stack.children(), callers, strict=True)
        ):
            return list(stack.children())
    return []
