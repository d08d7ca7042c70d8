"""Tensors out of checkpoint files: the only place in this project that calls a pickle reader.

`weights_only=True` builds tensors and containers only; what more a format needs is allowed by name. That is
no sandbox (crafted storages have crashed it before), which is why it runs offline, never in a server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from converter.errors import ConversionRefused

PICKLED: Final = frozenset({".bin", ".pt", ".pth", ".ckpt"})
_ALLOWED: Final[list[Any]] = [nn.Parameter, nn.ParameterList]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `path` holds: tensors by name, or (pickled files) containers of tensors."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals(_ALLOWED):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - what a broken or hostile file raises has many names
        first_line = str(error).split("\n", 1)[0]
        raise ConversionRefused(f"{path.name} can not be read safely: {first_line}") from None
    if not isinstance(held, dict):
        raise ConversionRefused(
            f"{path.name}: expected a dict of tensors, got {type(held).__name__}"
        )
    state = held.get("state_dict", held)  # Lightning wraps it
    return dict(state)


def tensors_of(state: dict[str, Any], what: str) -> dict[str, Tensor]:
    """`state` where every value is a tensor of numbers. Raises `ConversionRefused` for others."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ConversionRefused(
                f"{what}: {name[:64]!r} is {type(value).__name__}, expected tensors"
            )
    return state
