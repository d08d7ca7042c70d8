"""What the store makes of a file, by the path that an upload takes below HTTP, and whether that is right.

The oracle is safetensors' own library: whatever we accept it must accept, and what was stored must be its
values, read by a slow twin from its tensors alone. Called by `fuzz` and by the tests.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Final

import safetensors
import torch
from torch import Tensor

from prefix_store.artifact import TORCH_DTYPES, Prefix
from prefix_store.backends.memory import MemoryBackend
from prefix_store.errors import ArtifactTooLarge, PrefixRejected, PrefixStoreError
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.store import PrefixStore
from prefix_store.tensor_file import FILE_DTYPES
from tests.hostile.mutation import Mutant
from tests.hostile.originals import LIMITS, Original

MAX_SECONDS: Final = 0.05
"""Of the thread's own CPU time: a busy machine can not make a mutant slow."""

Tensors = dict[str, Tensor]
Taken = Prefix | SoftPrompt


@dataclass(frozen=True, slots=True)
class Judgement:
    """`outcome`: "accepted", or the class of the refusal. `faults`: what must never be, in sentences."""

    outcome: str
    seconds: float
    faults: tuple[str, ...]


def judged(mutant: Mutant) -> Judgement:
    """Uploads the mutant, times it, and compares with the oracle."""
    found: Taken | BaseException
    started = time.thread_time()
    backend = MemoryBackend()
    try:
        found = taken(mutant.original, mutant.data, backend)
    except Exception as error:  # noqa: BLE001 - whatever escapes is what is looked for
        found = error
    seconds = time.thread_time() - started
    faults = [f"took {seconds * 1e3:.1f} ms of CPU time"] if seconds > MAX_SECONDS else []
    if isinstance(found, PrefixRejected | ArtifactTooLarge):
        faults += faults_of_refusal(found)
        if backend.blobs or backend.logs:
            faults.append("a refused file left something in the store")
        if is_only_data(mutant) and must_be_accepted(mutant):
            faults.append(f"a file with nothing wrong was refused: {found}")
    elif isinstance(found, Exception):
        faults.append(f"{type(found).__name__} escaped: {found}")
    else:
        faults += faults_of_acceptance(mutant, found)
    outcome = type(found).__name__ if isinstance(found, Exception) else "accepted"
    return Judgement(outcome, seconds, tuple(faults))


def taken(original: Original, data: bytes, backend: MemoryBackend) -> Taken:
    """What `data` becomes, step by step as in `server.http.admin_upload`; a soft prompt is not baked."""
    store = PrefixStore(backend, original.base, LIMITS, host_cache_bytes=0)
    with store.begin_upload() as upload:
        upload.write(data)
        incoming = upload.translate(original.options)
        if incoming is None:
            digest = upload.commit("task").version.digest
        elif isinstance(incoming.content, SoftPrompt):
            return incoming.content
        else:
            digest = store.put("task", incoming.content).version.digest
    return store.load(digest).prefix


def faults_of_refusal(error: PrefixStoreError) -> list[str]:
    """A refusal is shown to whoever sent the file: short, encodable, telling nothing of the server."""
    problems = error.problems if isinstance(error, PrefixRejected) else ()
    texts = [str(error), *(text for p in problems for text in (p.pointer, p.detail))]
    faults = []
    if len(str(error)) > 60_000 or any(len(text) > 400 for text in texts[1:]):
        faults.append("the refusal is too long to show")
    if isinstance(error, PrefixRejected) and not all(problem.detail for problem in problems):
        faults.append("the refusal says nothing")
    if any("/tmp/" in text or "/work" in text for text in texts):
        faults.append("the refusal names a path of the server")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        faults.append("the refusal can not be encoded")
    return faults


def faults_of_acceptance(mutant: Mutant, found: Taken) -> list[str]:
    """Whether the library accepts the file too, and reads the same from it."""
    theirs = read_by_library(mutant.data)
    if theirs is None:
        return ["accepted what the safetensors library refuses"]
    try:
        same = same_values(mutant.original, theirs, found)
    except (KeyError, RuntimeError, ValueError) as error:
        return [f"accepted, but the twin can not read it: {type(error).__name__}: {error}"]
    faults = [] if same else ["accepted, but stored other values than the library reads"]
    if not is_servable(mutant.original, theirs):
        faults.append("accepted values that can not be served")
    if isinstance(found, Prefix) and "prompt_embeddings" not in theirs:
        faults += faults_of_manifest(mutant.data, found)
    return faults


# ---- the twin ------------------------------------------------------------------------------------


def read_by_library(data: bytes) -> Tensors | None:
    """The tensors of a file; None where the library refuses it."""
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: _tensor(entry) for name, entry in entries}


def is_only_data(mutant: Mutant) -> bool:
    """The header is as it was, and so is the length: only values can be wrong."""
    end, original = mutant.original.header_bytes, mutant.original.data
    return mutant.data[:end] == original[:end] and len(mutant.data) == len(original)


def must_be_accepted(mutant: Mutant) -> bool:
    """Whether values alone leave no reason for a refusal. Rotated keys may pass the limit, so not there."""
    theirs = read_by_library(mutant.data)
    if theirs is None or mutant.original.options.rebase:
        return False
    return is_servable(mutant.original, theirs)


def is_servable(original: Original, theirs: Tensors) -> bool:
    """Finite as they are and as they are served, and within the limit."""
    values = [*theirs.values()]
    if "prompt_embeddings" in theirs and _is_soft(original, theirs):
        values = [_embeddings(original, theirs)]
    serving = TORCH_DTYPES[original.base.layout.dtype]
    return all(
        bool(value.isfinite().all() and value.to(serving).isfinite().all())
        and float(value.abs().max()) <= LIMITS.max_abs_value
        for value in values
    )


def same_values(original: Original, theirs: Tensors, found: Taken) -> bool:
    """`found` against what follows from the library's tensors, bit for bit but for a rotation."""
    if isinstance(found, SoftPrompt):
        return torch.equal(found.embeddings, _embeddings(original, theirs).to(torch.float32))
    serving = TORCH_DTYPES[original.base.layout.dtype]
    keys, values = _layers(original, theirs)
    if original.options.rebase and found.manifest.source.get("rebased"):
        # Turning keeps the length of each pair (i, i + 1/2 D); the angles have tests of their own.
        ours, keys = [*map(_pair_lengths, found.keys)], [*map(_pair_lengths, keys)]
        if not all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(ours, keys, strict=True)):
            return False
        keys = list(found.keys)
    expected = [tensor.to(serving) for tensor in (*keys, *values)]
    pairs = zip(expected, (*found.keys, *found.values), strict=True)
    return all(theirs.shape == ours.shape and torch.equal(theirs, ours) for theirs, ours in pairs)


def faults_of_manifest(data: bytes, found: Prefix) -> list[str]:
    """Python's lenient JSON reader, for which the last of two keys wins, must have read the same fields."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    fields = json.loads(header["__metadata__"]["prefixd"])
    ours = found.manifest.model_dump(mode="json", exclude_unset=True)
    if "rebased" in ours.get("source", {}):
        return []
    return [] if _settled(ours) == _settled(fields) else [f"read {ours} where {fields} is written"]


def _settled(fields: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(fields))  # type: ignore[no-any-return]


def _tensor(entry: dict[str, Any]) -> Tensor:
    """Dtypes that we never accept become empty tensors, which are equal to nothing."""
    dtype = TORCH_DTYPES.get(FILE_DTYPES.get(entry["dtype"], ""))
    if dtype is None or not entry["data"]:
        return torch.empty(0)
    return torch.frombuffer(bytearray(entry["data"]), dtype=dtype).view(entry["shape"])


def _layers(original: Original, theirs: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values per layer, `[P, H_kv, D]`."""
    layers = original.base.layout.layers
    if "prompt_embeddings" not in theirs:
        assert len(theirs) == 2 * len(layers)
        names = [f"dec_self.{layer:03d}." for layer in range(len(layers))]
        return [theirs[name + "k"] for name in names], [theirs[name + "v"] for name in names]
    rows, (heads, dim) = theirs["prompt_embeddings"], (layers[0].num_kv_heads, layers[0].key_dim)
    slots = [slot.reshape(-1, heads, dim) for slot in rows.split(heads * dim, dim=1)]
    return slots[0::2], slots[1::2]


def _is_soft(original: Original, theirs: Tensors) -> bool:
    return theirs["prompt_embeddings"].shape[-1] == original.base.hidden_size


def _embeddings(original: Original, theirs: Tensors) -> Tensor:
    rows = theirs["prompt_embeddings"]
    if "prefix_task_cols" not in theirs:
        return rows
    task = original.options.task_index
    assert task is not None
    return rows * (theirs["prefix_task_cols"][task] @ theirs["prefix_task_rows"][task])


def _pair_lengths(keys: Tensor) -> Tensor:
    first, second = keys.to(torch.float64).chunk(2, dim=-1)
    return (first**2 + second**2).sqrt()
