"""The valid files that mutants are made from: artifacts and PEFT files, one of each way that a server reads them.

Each is for a base of its own choosing, small enough that a mutant costs microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from prefix_store.importers.geometry import row_geometry
from prefix_store.importers.recognition import ImportOptions
from prefix_store.spec import BaseSpec, LayerRotary
from prefix_store.validation import Limits
from tests.prefix_store.builders import TINY_BASE, make_artifact
from tests.prefix_store.importers.peft_files import peft_file, prompt

# 2 layers, 2 kv heads of 4: a PEFT row has 32 elements, an embedding 24.
BASE: Final = replace(
    TINY_BASE,
    hidden_size=24,
    num_attention_heads=6,
    rotary=(LayerRotary((1.0, 0.01), False),) * 2,
)
LIMITS: Final = Limits(max_num_virtual_tokens=16)
TASK_INDEX: Final = 1

_FULL_MANIFEST: Final[dict[str, Any]] = {
    "generation": {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 7, "stop": ["END"]},
    "description": "a task, with \u00e9 and \u2028",
    "probe": {
        "input_ids": [5, 7],
        "top_ids": [1, 2],
        "top_logprobs": [-0.5, -1.25],
        "tolerance": 0.1,
    },
    "training": {"steps": 100, "loss": 0.25, "data": ["a", "b"]},
}


@dataclass(frozen=True, slots=True)
class Original:
    """A file that a server for `base` takes with `options`."""

    name: str
    data: bytes
    base: BaseSpec
    options: ImportOptions = field(default_factory=ImportOptions)

    @property
    def header_bytes(self) -> int:
        """Length and header together: where the data begins."""
        return 8 + int.from_bytes(self.data[:8], "little")


def originals(base: BaseSpec = BASE) -> tuple[Original, ...]:
    """All of them; `base` has one shape for all layers, a known rotation, and float32 as its dtype.

    Where `base` is a model that runs, none carries a probe: it would not reproduce one that was made up.
    """
    manifest = _FULL_MANIFEST | ({} if base == BASE else {"probe": None})
    assert base.hidden_size is not None
    width, hidden = row_geometry(base).width, base.hidden_size
    half = replace(base, layout=replace(base.layout, dtype="float16"))
    multitask = peft_file(
        prompt_embeddings=prompt(3, hidden, seed=1),
        prefix_task_cols=torch.stack([prompt(3, 2, seed=seed) for seed in (2, 3)]),
        prefix_task_rows=torch.stack([prompt(2, hidden, seed=seed) for seed in (4, 5)]),
    )
    return (
        Original("native-f32", make_artifact(base, 3, **manifest), base),
        Original("native-bf16", make_artifact(base, 2, seed=1, dtype="bfloat16"), base),
        Original("native-f16", make_artifact(base, 1, seed=2, dtype="float16"), base),
        Original("native-f32-for-f16", make_artifact(half, 2, seed=3), half),
        Original(
            "native-to-rebase",
            make_artifact(base, 3, token_start=1),
            base,
            ImportOptions(rebase=True),
        ),
        Original("peft-prefix-f32", peft_file(prompt_embeddings=prompt(3, width)), base),
        Original(
            "peft-prefix-bf16",
            peft_file({}, prompt_embeddings=prompt(2, width, dtype="bfloat16")),
            base,
        ),
        Original(
            "peft-soft-f16", peft_file(prompt_embeddings=prompt(3, hidden, dtype="float16")), base
        ),
        Original("peft-multitask", multitask, base, ImportOptions(task_index=TASK_INDEX)),
    )
