"""Hostile PEFT files, each with a name that says what is wrong with it and the refusal that it must get.

For `originals.BASE`: 2 layers with 2 key/value heads of 4, hidden size 24; so rows of 32 or 24 elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from prefix_store.errors import (
    ImportRefused,
    IncompatiblePrefix,
    MalformedArtifact,
    PrefixRejected,
)
from prefix_store.importers.recognition import ImportOptions
from tests.prefix_store.builders import data_of, framed, header_of, make_artifact
from tests.prefix_store.importers.peft_files import peft_file, prompt

ROWS, SOFT = prompt(3, 32), prompt(3, 24)
VALID: Final = peft_file(prompt_embeddings=ROWS)
COLS, RIGHT = prompt(6, 2).view(2, 3, 2), prompt(4, 24).view(2, 2, 24)


class Foreign(NamedTuple):
    """A file, the refusal that it must get, and what its sender says beside it."""

    data: bytes
    error: type[PrefixRejected] = ImportRefused
    options: ImportOptions = ImportOptions()


def rows(tensor: Tensor, error: type[PrefixRejected] = ImportRefused) -> Foreign:
    """A file of nothing but these rows."""
    return Foreign(peft_file(prompt_embeddings=tensor), error)


def multitask(
    cols: Tensor = COLS, right: Tensor = RIGHT, soft: Tensor = SOFT, index: int | None = 1
) -> Foreign:
    data = peft_file(prompt_embeddings=soft, prefix_task_cols=cols, prefix_task_rows=right)
    return Foreign(data, options=ImportOptions(task_index=index))


def beside(**tensors: Tensor) -> Foreign:
    """The valid file with more tensors in it."""
    return Foreign(peft_file(prompt_embeddings=ROWS, **tensors))


def said(**options: Any) -> Foreign:
    """The valid file, and something about it that is not so."""
    return Foreign(VALID, options=ImportOptions(**options))


def holding(value: float, tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def header_with(
    change: Callable[[dict[str, Any]], object], error: type[PrefixRejected] = MalformedArtifact
) -> Foreign:
    header = header_of(VALID)
    change(header)
    return Foreign(framed(header, data_of(VALID)), error)


def prompt_with(**fields: Any) -> Foreign:
    return header_with(lambda header: header["prompt_embeddings"].update(fields))


def metadata(value: Any, error: type[PrefixRejected] = MalformedArtifact) -> Foreign:
    return header_with(lambda header: header.update(__metadata__=value), error)


def duplicated() -> bytes:
    text = VALID[8 : 8 + int.from_bytes(VALID[:8], "little")].decode()
    entry = '"prompt_embeddings":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
    return framed(
        text.replace('"prompt_embeddings"', f'{entry}"prompt_embeddings"'), data_of(VALID)
    )


def sharing_bytes() -> Foreign:
    """Factors of a multitask file that lie on top of each other."""
    data = multitask().data
    header = header_of(data)
    header["prefix_task_rows"]["data_offsets"] = [0, RIGHT.numel() * 4]
    return Foreign(framed(header, data_of(data)), MalformedArtifact, ImportOptions(task_index=1))


def native_with_rows() -> Foreign:
    """An artifact that also holds a PEFT tensor: its manifest decides what it is."""
    data = make_artifact()
    header = header_of(data)
    header["prompt_embeddings"] = {"dtype": "F32", "shape": [1, 24], "data_offsets": [384, 480]}
    return Foreign(framed(header, data_of(data) + bytes(96)), MalformedArtifact)


LAYER: Final = "base_model.model.model.layers.0.self_attn.q_proj"

FOREIGN: Final[dict[str, Foreign]] = {
    "rows of rank one": rows(torch.ones(32)),
    "rows of rank three": rows(torch.ones(3, 4, 8)),
    "rows of rank five": rows(torch.ones(1, 3, 1, 4, 8)),
    "rows of rank six": rows(torch.ones(1, 1, 3, 1, 4, 8), MalformedArtifact),
    "a scalar": rows(torch.tensor(1.0), MalformedArtifact),
    "no rows": rows(torch.ones(0, 32), MalformedArtifact),
    "rows of no width": rows(torch.ones(3, 0), MalformedArtifact),
    "rows one element too wide": rows(torch.ones(3, 33)),
    "rows one element too narrow": rows(torch.ones(3, 31)),
    "rows one element wider than an embedding": rows(torch.ones(3, 25)),
    "rows of one element": rows(torch.ones(3, 1)),
    "rows and columns swapped": rows(ROWS.T.contiguous()),
    "rows of half of the layers": rows(torch.ones(3, 16)),
    "rows of a layer more": rows(torch.ones(3, 48)),
    "rows of one head per attention head": rows(torch.ones(3, 96)),
    "more rows than allowed": rows(torch.ones(17, 32)),
    "more rows of a soft prompt than allowed": rows(torch.ones(17, 24)),
    "five hundred rows": rows(torch.ones(500, 32)),
    **{
        f"rows of dtype {dtype}": rows(torch.ones(3, 32).to(dtype), MalformedArtifact)
        for dtype in (
            *(torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool),
            *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
        )
    },
    "NaN in a prefix": rows(holding(float("nan"), ROWS), IncompatiblePrefix),
    "infinity in a prefix": rows(holding(float("inf"), ROWS), IncompatiblePrefix),
    "1e30 in a prefix": rows(holding(1e30, ROWS), IncompatiblePrefix),
    "minus infinity in a bfloat16 prefix": rows(
        holding(float("-inf"), ROWS.bfloat16()), IncompatiblePrefix
    ),
    "largest float16 in a prefix": rows(holding(65504.0, ROWS.half()), IncompatiblePrefix),
    "NaN in a soft prompt": rows(holding(float("nan"), SOFT)),
    "infinity in a soft prompt": rows(holding(float("inf"), SOFT)),
    "1e5 in a soft prompt": rows(holding(-1e5, SOFT)),
    "NaN in a float16 soft prompt": rows(holding(float("nan"), SOFT.half())),
    "task without an index": multitask(index=None),
    "task behind the last": multitask(index=2),
    "task before the first": multitask(index=-1),
    "task of a billion": multitask(index=10**9),
    "factors of rank two": multitask(COLS[0].clone(), RIGHT[0].clone()),
    "factors of different numbers of tasks": multitask(COLS[:1].clone()),
    "factors of different ranks": multitask(torch.ones(2, 3, 3)),
    "factors of another number of tokens": multitask(torch.ones(2, 4, 2)),
    "factors of another width": multitask(right=torch.ones(2, 2, 25)),
    "factors of no rank": multitask(torch.ones(2, 3, 0), torch.ones(2, 0, 24))._replace(
        error=MalformedArtifact
    ),
    "factors and rows as wide as a prefix": multitask(right=torch.ones(2, 2, 32), soft=ROWS),
    "factors whose product overflows float16": multitask(
        torch.full((2, 3, 2), 6e4).half(), torch.full((2, 2, 24), 6e4).half(), SOFT.half()
    ),
    "factors whose product is too large": multitask(torch.full((2, 3, 2), 1e3), RIGHT * 1e3),
    "factors whose product is NaN": multitask(holding(float("inf"), COLS), torch.zeros(2, 2, 24)),
    "NaN in a factor": multitask(holding(float("nan"), COLS)),
    "factors of mixed dtypes": multitask(COLS.half())._replace(error=MalformedArtifact),
    "factors that share their bytes": sharing_bytes(),
    "columns without rows": beside(prefix_task_cols=COLS),
    "rows without columns": beside(prefix_task_rows=RIGHT),
    "factors without a prompt": Foreign(peft_file(prefix_task_cols=COLS, prefix_task_rows=RIGHT)),
    "a module to save": beside(**{"base_model.lm_head.weight": torch.ones(4, 4)}),
    "an embedding of the base": beside(**{"model.embed_tokens.weight": torch.ones(4, 4)}),
    "LoRA beside a prompt": beside(**{f"{LAYER}.lora_A.weight": torch.ones(2, 4)}),
    "nothing but LoRA": Foreign(
        peft_file(**{f"{LAYER}.lora_A.weight": torch.ones(2, 4)}), MalformedArtifact
    ),
    "layers of an artifact beside a prompt": beside(**{"dec_self.000.k": torch.ones(3, 2, 4)}),
    "an artifact that also holds rows": native_with_rows(),
    "an artifact's manifest on a PEFT file": metadata({"prefixd": "{}"}),
    "the name in upper case": Foreign(peft_file(PROMPT_EMBEDDINGS=ROWS), MalformedArtifact),
    "the name with a zero byte behind": beside(**{"prompt_embeddings\0": torch.ones(1)}),
    "the name behind a path": Foreign(
        peft_file(**{"../prompt_embeddings": ROWS}), MalformedArtifact
    ),
    "the name of a wrapped model": Foreign(
        peft_file(**{"base_model.prompt_encoder.default.embedding.weight": ROWS}), MalformedArtifact
    ),
    "two prompts of one name": Foreign(duplicated(), MalformedArtifact),
    "four thousand tensors": header_with(
        lambda header: header.update({f"{number}": None for number in range(4000)})
    ),
    "metadata that is unknown": metadata({"format": "pt", "auto_map": "evil.Model"}, ImportRefused),
    "metadata that is no text": metadata({"format": 1}),
    "metadata that is a list": metadata(["pt"]),
    "shape whose product wraps around": prompt_with(shape=[2**32, 2**32 + 3]),
    "shape of a million rows": prompt_with(shape=[10**6, 32]),
    "shape that is negative": prompt_with(shape=[-3, -32]),
    "shape with a fraction": prompt_with(shape=[3.0, 32]),
    "offsets that begin late": prompt_with(data_offsets=[4, 388]),
    "offsets that end early": prompt_with(data_offsets=[0, 380]),
    "offsets that are reversed": prompt_with(data_offsets=[384, 0]),
    "a field more": prompt_with(strides=[32, 1]),
    "a byte behind the data": Foreign(VALID + b"\0", MalformedArtifact),
    "a zip behind the data": Foreign(VALID + b"PK\x05\x06" + bytes(18), MalformedArtifact),
    "a byte too few": Foreign(VALID[:-1], MalformedArtifact),
    "64 spaces of padding": Foreign(
        framed(VALID[8:].partition(b"}}")[0] + b"}}" + b" " * 64, data_of(VALID)), MalformedArtifact
    ),
    "said to be LoRA": said(peft_type="LORA"),
    "said to be of no type": said(peft_type=""),
    "said to be a path": said(peft_type="../../etc/passwd"),
    "said to be a soft prompt": said(peft_type="PROMPT_TUNING"),
    "said to be multitask": said(peft_type="MULTITASK_PROMPT_TUNING"),
    "said to have tasks": said(task_index=0),
    "an artifact said to be PEFT": Foreign(
        make_artifact(), options=ImportOptions(peft_type="PREFIX_TUNING")
    ),
    "an artifact said to have tasks": Foreign(make_artifact(), options=ImportOptions(task_index=0)),
}
