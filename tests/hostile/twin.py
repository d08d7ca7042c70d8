"""The slow and obvious twin of the readers: what a file must become, from the tensors of safetensors' own library.

It shares no code with `header`, `artifact` and `importers`. Called by `judge`.
"""

from __future__ import annotations

import json
from typing import Any, Final

import safetensors
import torch
from torch import Tensor

from prefix_store.artifact import Prefix
from prefix_store.importers.soft_prompt import SoftPrompt
from tests.hostile.mutation import Mutant
from tests.hostile.originals import LIMITS, Original

Tensors = dict[str, Tensor]

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SERVED: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_by_library(data: bytes) -> Tensors | None:
    """The tensors of a file; None where the library refuses it."""
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: _tensor(entry) for name, entry in entries}


def is_servable(original: Original, theirs: Tensors) -> bool:
    """Finite as they are and as they are served, and within the limit."""
    is_soft = "prompt_embeddings" in theirs and (
        theirs["prompt_embeddings"].shape[-1] == original.base.hidden_size
    )
    values = [_embeddings(original, theirs)] if is_soft else [*theirs.values()]
    serving = _SERVED[original.base.layout.dtype]
    return all(
        bool(value.isfinite().all() and value.to(serving).isfinite().all())
        and float(value.abs().max()) <= LIMITS.max_abs_value
        for value in values
    )


def same_soft_prompt(original: Original, theirs: Tensors, found: SoftPrompt) -> bool:
    """Bit for bit."""
    return torch.equal(found.embeddings, _embeddings(original, theirs).to(torch.float32))


def same_prefix(mutant: Mutant, theirs: Tensors, found: Prefix) -> bool:
    """Bit for bit, but for subnormals and for keys that were rotated; and, of an artifact, field for field."""
    serving = _SERVED[mutant.original.base.layout.dtype]
    keys, values = _layers(mutant.original, theirs)
    pairs = list(zip(values, found.values, strict=True))
    was_rotated = "rebased" in found.manifest.source
    if was_rotated:
        pairs_of_keys = zip(keys, found.keys, strict=True)
        if not all(_same_up_to_rotation(theirs, ours) for theirs, ours in pairs_of_keys):
            return False
    else:
        pairs += zip(keys, found.keys, strict=True)
    same = all(torch.equal(_as_served(theirs.to(serving)), ours) for theirs, ours in pairs)
    if was_rotated or "prompt_embeddings" in theirs:
        return same
    return same and _fields(mutant.data) == found.manifest.model_dump(
        mode="json", exclude_unset=True
    )


def _as_served(tensor: Tensor) -> Tensor:
    """One value after the other: what is too small to be a normal number is zero, but in float16."""
    if tensor.dtype == torch.float16:
        return tensor
    least = torch.finfo(tensor.dtype).smallest_normal
    values = [0.0 if abs(value) < least else value for value in tensor.flatten().tolist()]
    return torch.tensor(values, dtype=tensor.dtype).view(tensor.shape)


def _fields(data: bytes) -> dict[str, Any]:
    """The manifest as Python's lenient reader has it, for which the last of two equal keys wins."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    fields: dict[str, Any] = json.loads(header["__metadata__"]["prefixd"])
    return fields


def _tensor(entry: dict[str, Any]) -> Tensor:
    """One of a dtype that is never accepted becomes empty, which equals nothing."""
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None or not entry["data"]:
        return torch.empty(0)
    return torch.frombuffer(bytearray(entry["data"]), dtype=dtype).view(entry["shape"])


def _layers(original: Original, theirs: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values per layer, `[P, H_kv, D]`; all layers have one shape."""
    layers = original.base.layout.layers
    if "prompt_embeddings" not in theirs:
        names = [f"dec_self.{layer:03d}." for layer in range(len(layers))]
        if len(theirs) != 2 * len(layers):
            raise LookupError("tensors that nobody reads")
        return [theirs[name + "k"] for name in names], [theirs[name + "v"] for name in names]
    rows, (heads, dim) = theirs["prompt_embeddings"], (layers[0].num_kv_heads, layers[0].key_dim)
    slots = [slot.reshape(-1, heads, dim) for slot in torch.split(rows, heads * dim, dim=1)]
    return slots[0::2], slots[1::2]


def _embeddings(original: Original, theirs: Tensors) -> Tensor:
    rows, task = theirs["prompt_embeddings"], original.options.task_index
    if "prefix_task_cols" not in theirs:
        return rows
    if task is None:
        raise LookupError("a multitask file without a task")
    return rows * (theirs["prefix_task_cols"][task] @ theirs["prefix_task_rows"][task])


def _same_up_to_rotation(theirs: Tensor, ours: Tensor) -> bool:
    """Turning keeps the length of each pair (i, i + D/2); the angles have tests of their own."""
    return theirs.shape == ours.shape and torch.allclose(
        _pair_lengths(ours), _pair_lengths(theirs), rtol=1e-2
    )


def _pair_lengths(keys: Tensor) -> Tensor:
    first, second = keys.to(torch.float64).chunk(2, dim=-1)
    return torch.hypot(first, second)
