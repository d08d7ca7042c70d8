"""A bare PEFT `adapter_model.safetensors` of any prompt-learning method, for a decoder-only base.

`recognise` needs the header alone, so that memory for the tensors is taken only when they could be right;
`PeftFile.read` then turns them into a native artifact, or into a soft prompt that is still to be baked.
Pure functions on any thread; called by `importers.incoming` and `converter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from pydantic import JsonValue
from torch import Tensor

from prefix_store.artifact import TORCH_DTYPES
from prefix_store.errors import ImportRefused, Problem
from prefix_store.importers.geometry import (
    MULTITASK,
    PEFT_TYPES,
    RowGeometry,
    is_prefix,
    row_geometry,
)
from prefix_store.importers.native import LayerTensors, native_artifact
from prefix_store.importers.recognition import (
    UNKNOWN_BASE,
    ImportOptions,
    Provenance,
    Recognition,
)
from prefix_store.importers.soft_prompt import SoftPrompt, checked_embeddings
from prefix_store.spec import BaseSpec
from prefix_store.tensor_file import TensorEntry, TensorFile
from prefix_store.validation import Limits

PROMPT: Final = "prompt_embeddings"
COLS: Final = "prefix_task_cols"
ROWS: Final = "prefix_task_rows"
KEYS: Final = frozenset({PROMPT, COLS, ROWS})


@dataclass(frozen=True, slots=True)
class PeftFile:
    """A recognised file: what it is, and how its tensors are to be read."""

    file: TensorFile
    base: BaseSpec
    limits: Limits
    recognition: Recognition
    rows: RowGeometry | None
    task_index: int | None = None

    def read(self, data: bytearray, digest: str) -> bytes | SoftPrompt:
        """The native artifact, or the soft prompt, that is in `data`. Raises `ImportRefused`."""
        found = self.read_tensors(data, digest)
        if isinstance(found, SoftPrompt):
            return found
        return native_artifact(self.base, *found, self._provenance(digest))

    def read_tensors(self, data: bytearray, digest: str) -> LayerTensors | SoftPrompt:
        """The same before it is written down as an artifact."""
        embeddings = self._tensor(data, PROMPT)
        if self.rows is not None:
            return split_rows(embeddings, self.rows, self.base)
        if self.task_index is not None:
            cols, rows = self._tensor(data, COLS), self._tensor(data, ROWS)
            embeddings = embeddings * (cols[self.task_index] @ rows[self.task_index])
        checked = checked_embeddings(embeddings, self.limits.max_abs_value)
        return SoftPrompt(checked, self._provenance(digest))

    def _provenance(self, digest: str) -> Provenance:
        details: dict[str, JsonValue] = {"container": "adapter_model.safetensors"}
        if self.task_index is not None:
            details["task_index"] = self.task_index
        return Provenance("peft", self.recognition, digest, details)

    def _tensor(self, data: bytearray, name: str) -> Tensor:
        entry = self.file.tensors[name]
        dtype = TORCH_DTYPES[self.file.dtype]
        count = (entry.end - entry.begin) // dtype.itemsize
        offset = self.file.data_start + entry.begin
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(entry.shape)


def split_rows(embeddings: Tensor, rows: RowGeometry, base: BaseSpec) -> LayerTensors:
    """`[P, 2*L*H*D]` -> K (slot 2l) and V (slot 2l + 1) of each layer l, `[P, H_l, D_l]`."""
    num_tokens = embeddings.shape[0]
    slots = embeddings.view(num_tokens, 2 * rows.num_layers, rows.num_heads, rows.head_dim)
    keys, values = [], []
    for index, layer in enumerate(base.layout.layers):
        heads, dim = layer.num_kv_heads, layer.key_dim
        keys.append(slots[:, 2 * index, :heads, :dim].contiguous())
        values.append(slots[:, 2 * index + 1, :heads, :dim].contiguous())
    return keys, values


def recognise(file: TensorFile, base: BaseSpec, limits: Limits, options: ImportOptions) -> PeftFile:
    """What the header tells. Raises `ImportRefused` or `AmbiguousFormat`."""
    _check_keys(file)
    _check_type(file, options)
    num_tokens, width = _matrix(file.tensors[PROMPT])
    _check_num_tokens(num_tokens, base, limits)
    if COLS in file.tensors:
        return _multitask(file, base, limits, options)
    if options.task_index is not None:
        raise ImportRefused.at("/task_index", "task_index: the file holds no multitask prompt")
    shape = f"{PROMPT} [{num_tokens}, {width}] {file.dtype}"
    if is_prefix(width, base, options.peft_type):
        rows = row_geometry(base)
        recognised = f"PEFT prefix tuning or cartridge: {shape} = {rows}"
        return PeftFile(file, base, limits, _recognition(recognised, num_tokens, rows, base), rows)
    recognised = f"PEFT prompt tuning, p-tuning or CPT: {shape}, a soft prompt"
    return PeftFile(file, base, limits, _recognition(recognised, num_tokens, None, base), None)


def _multitask(
    file: TensorFile, base: BaseSpec, limits: Limits, options: ImportOptions
) -> PeftFile:
    """prompt_i = embeddings * (cols[i] @ rows[i])."""
    num_tokens, width = _matrix(file.tensors[PROMPT])
    if width != base.hidden_size:
        detail = (
            f"rows of {width} elements, expected the base model's hidden size {base.hidden_size}"
        )
        raise ImportRefused.at(f"/tensors/{PROMPT}/shape", detail)
    cols, rows = file.tensors[COLS].shape, file.tensors[ROWS].shape
    if len(cols) != 3 or len(rows) != 3:
        raise ImportRefused.at(f"/tensors/{COLS}/shape", f"{COLS}, {ROWS}: expected rank 3 of both")
    num_tasks, rank = cols[0], cols[2]
    expected = ((num_tasks, num_tokens, rank), (num_tasks, rank, width))
    if (cols, rows) != expected:
        detail = f"{COLS} {list(cols)} and {ROWS} {list(rows)}: expected {list(expected[0])} and {list(expected[1])}"
        raise ImportRefused.at(f"/tensors/{COLS}/shape", detail)
    index = options.task_index
    if index is None or not 0 <= index < num_tasks:
        came = "none" if index is None else str(index)
        detail = f"a multitask prompt of {num_tasks} tasks: expected task_index 0 to {num_tasks - 1}, got {came}"
        raise ImportRefused.at("/task_index", detail)
    recognised = (
        f"PEFT multitask prompt tuning: task {index} of {num_tasks}, "
        f"{PROMPT} [{num_tokens}, {width}] {file.dtype}, a soft prompt"
    )
    recognition = _recognition(recognised, num_tokens, None, base)
    return PeftFile(file, base, limits, recognition, None, index)


def _recognition(
    recognised: str, num_tokens: int, rows: RowGeometry | None, base: BaseSpec
) -> Recognition:
    assumed = [f"requests start at position {num_tokens}, behind the prefix, as PEFT has it"]
    if rows is None:
        assumed.append("the prompt stands alone at the start: baked with one prefill, exactly")
    elif base.position_scheme == "rope":
        assumed.append("keys carry the rotary embedding")
    if rows is not None and len({(x.num_kv_heads, x.key_dim) for x in base.layout.layers}) > 1:
        assumed.append("layers narrower than the widest read the first heads and elements")
    return Recognition(recognised, tuple(assumed), (UNKNOWN_BASE,))


def _check_keys(file: TensorFile) -> None:
    """Exactly PEFT's keys; `modules_to_save` puts whole modules of the base beside them."""
    names = set(file.tensors)
    extra = sorted(names - KEYS)
    problems = [
        Problem(
            f"/tensors/{name[:64]}",
            f"tensor {name[:64]!r} is not part of a prompt: PEFT's modules_to_save replaces modules of the "
            "base model, which all tasks share here; expected only " + ", ".join(sorted(KEYS)),
        )
        for name in extra
    ]
    expected = KEYS if names & {COLS, ROWS} else {PROMPT}
    problems += [
        Problem(f"/tensors/{name}", f"tensor {name} is missing")
        for name in sorted(expected - names)
    ]
    unknown = sorted(file.metadata.keys() - {"format"})
    problems += [
        Problem("/__metadata__", f"unexpected metadata key {key[:64]!r}") for key in unknown
    ]
    if problems:
        raise ImportRefused(problems)


def _check_type(file: TensorFile, options: ImportOptions) -> None:
    """What the caller says the file is, against the tensors in it."""
    peft_type = options.peft_type
    if peft_type is None:
        return
    if peft_type not in PEFT_TYPES:
        detail = f"peft_type {peft_type[:64]!r}: expected one of {', '.join(PEFT_TYPES)}"
        raise ImportRefused.at("/peft_type", detail)
    is_multitask = COLS in file.tensors
    if is_multitask != (peft_type == MULTITASK):
        held = MULTITASK if is_multitask else ", ".join(t for t in PEFT_TYPES if t != MULTITASK)
        detail = f"peft_type {peft_type}: the tensors are those of {held}"
        raise ImportRefused.at("/peft_type", detail)


def _matrix(entry: TensorEntry) -> tuple[int, int]:
    if len(entry.shape) != 2:
        detail = f"{PROMPT}: expected a shape [P, width], got {list(entry.shape)}"
        raise ImportRefused.at(f"/tensors/{PROMPT}/shape", detail)
    return entry.shape[0], entry.shape[1]


def _check_num_tokens(num_tokens: int, base: BaseSpec, limits: Limits) -> None:
    allowed = limits.max_num_virtual_tokens
    if base.position_limit is not None:
        allowed = min(allowed, base.position_limit - 1)
    if num_tokens > allowed:
        detail = (
            f"the prefix has {num_tokens} tokens, this server and its model allow {max(allowed, 0)}"
        )
        raise ImportRefused.at(f"/tensors/{PROMPT}/shape", detail)
