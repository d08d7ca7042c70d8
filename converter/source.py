"""What the user points at: a file or a directory with its configuration beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from converter.checkpoints import PICKLED, read_checkpoint
from converter.errors import ConversionRefused

_CONFIGS: Final = ("adapter_config.json", "config.json")
_WEIGHTS: Final = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter.safetensors",
    "pytorch_adapter.bin",
    "model.safetensors",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Source:
    """`weights`: the file with the tensors. `config`: the JSON beside it, empty if there is none."""

    weights: Path
    config_name: str
    config: dict[str, Any]

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of `weights`."""
        return read_checkpoint(self.weights)

    @cached_property
    def sha256(self) -> str:
        """`sha256:<hex>` of the file with the tensors."""
        return f"sha256:{hashlib.sha256(self.weights.read_bytes()).hexdigest()}"


def open_source(path: Path) -> Source:
    """The source at `path`; PEFT keeps an adapter that has a name one directory further down."""
    if not path.exists():
        raise ConversionRefused(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix not in {*PICKLED, ".safetensors"}:
            expected = ", ".join(sorted({*PICKLED, ".safetensors"}))
            raise ConversionRefused(f"{path.name}: expected a directory or a file {expected}")
        return _with_config(path)
    found = _weights_in(path) or [
        file for inner in _directories(path) for file in _weights_in(inner)
    ]
    if not found:
        raise ConversionRefused(f"{path}: expected one of {', '.join(_WEIGHTS)}, found none")
    parents = {file.parent for file in found}
    if len(parents) > 1:
        names = ", ".join(sorted(parent.name for parent in parents))
        raise ConversionRefused(f"{path} holds several adapters ({names}); name one of them")
    return _with_config(found[0])


def _directories(path: Path) -> list[Path]:
    return sorted(inner for inner in path.iterdir() if inner.is_dir())


def _weights_in(directory: Path) -> list[Path]:
    return [directory / name for name in _WEIGHTS if (directory / name).is_file()]


def _with_config(weights: Path) -> Source:
    for name in _CONFIGS:
        file = weights.parent / name
        if file.is_file():
            return Source(weights, name, _read_config(file))
    return Source(weights, "", {})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionRefused(f"{path.name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConversionRefused(f"{path.name}: expected a JSON object")
    return config
