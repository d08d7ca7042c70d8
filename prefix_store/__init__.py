"""The prefix store: artifacts, their proof against the resident model, versions, and the host tier.

Peer of `server` and of the trainer, which meet only here. Importing this package loads no tensor library;
`Prefix`, `PrefixStore`, `encode` and the like are fetched from their modules on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from prefix_store.errors import PrefixStoreError
from prefix_store.spec import (
    BaseSpec,
    KVLayout,
    LayerLayout,
    PrefixManifest,
    PrefixVersion,
    TaskInfo,
)

if TYPE_CHECKING:
    from prefix_store.artifact import Prefix, decode, encode, save
    from prefix_store.fingerprint import base_fingerprint, base_model_ref
    from prefix_store.store import LoadedPrefix, PrefixStore, StoreStats
    from prefix_store.upload import PutResult, Upload

__all__ = [
    "BaseSpec",
    "KVLayout",
    "LayerLayout",
    "LoadedPrefix",
    "Prefix",
    "PrefixManifest",
    "PrefixStore",
    "PrefixStoreError",
    "PrefixVersion",
    "PutResult",
    "StoreStats",
    "TaskInfo",
    "Upload",
    "base_fingerprint",
    "base_model_ref",
    "decode",
    "encode",
    "save",
]

_HOMES: Final = {
    "LoadedPrefix": "store",
    "Prefix": "artifact",
    "PrefixStore": "store",
    "PutResult": "upload",
    "StoreStats": "store",
    "Upload": "upload",
    "base_fingerprint": "fingerprint",
    "base_model_ref": "fingerprint",
    "decode": "artifact",
    "encode": "artifact",
    "save": "artifact",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
