"""The teacher: what the base with a chunk of the document before it finds probable, the k best tokens at each place.

Computed once, by the base as training runs it, and kept in the run folder as safetensors files of `SHARD` conversations; a
run that is resumed reads those that are there. Main thread; called by `distillation`.

N = tokens of answers, k = tokens that are kept for each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.base import FrozenBase
from trainer.batches import make_batch
from trainer.distill.conversations import Conversation
from trainer.encoding import EncodedExample
from trainer.errors import RunFolderFailed
from trainer.loss import widened
from trainer.run_folder import write_durably

SHARD: Final = 64
BYTES_A_LOGIT: Final = 8  # an int32 token and its float32 log-probability
_KEY: Final = "prefixd.teacher"


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """One answer. `token_ids` int64 [N, k], the most probable first; `log_probs` float32 [N, k], not renormalised."""

    token_ids: Tensor
    log_probs: Tensor


def teacher_of(
    base: FrozenBase,
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    top_k: int,
    rows: int,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> dict[int, TopK] | None:
    """By the conversation's number; None when it was asked to stop. `rows`: conversations of a forward pass.

    Raises `RunFolderFailed`.
    """
    used = [c for c in conversations if not c.left_out]
    found: dict[int, TopK] = {}
    on_progress(0, len(used))
    for start in range(0, len(used), SHARD):
        if should_stop():
            return None
        shard = used[start : start + SHARD]
        path = folder / f"{start // SHARD:05}.safetensors"
        about = _about(base, shard, top_k)
        known = _read(path, about)
        if known is None:
            known = top_k_logits(base, shard, top_k, rows)
            _write(path, about, known)
        found |= known
        on_progress(len(found), len(used))
    return found


@torch.no_grad()
def top_k_logits(
    base: FrozenBase, conversations: Sequence[Conversation], top_k: int, rows: int
) -> dict[int, TopK]:
    """The teacher's, on the host. At most all tokens of the vocabulary but one are kept: the rest is never empty."""
    by_length = sorted(conversations, key=lambda c: len(c.teacher_token_ids))
    found: dict[int, TopK] = {}
    for start in range(0, len(by_length), rows):
        some = by_length[start : start + rows]
        examples = [EncodedExample(c.teacher_token_ids, c.answer_token_ids, "") for c in some]
        logits = widened(base.logits(None, make_batch(examples, base.device)))  # [N of all, V]
        best = logits.log_softmax(-1).float().topk(min(top_k, logits.shape[-1] - 1))
        counts = [len(c.answer_token_ids) for c in some]
        ids, values = best.indices.cpu(), best.values.cpu()
        parts = zip(torch.split(ids, counts), torch.split(values, counts), strict=True)
        for conversation, (token_ids, log_probs) in zip(some, parts, strict=True):
            found[conversation.number] = TopK(token_ids.clone(), log_probs.clone())
    return found


def _about(base: FrozenBase, shard: Sequence[Conversation], top_k: int) -> str:
    """What a shard belongs to: the base, the tokens, k."""
    tokens = [[c.number, c.teacher_token_ids, c.answer_token_ids] for c in shard]
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    return json.dumps({"base": base.spec.fingerprint, "tokens": digest, "top_k": top_k})


def _write(path: Path, about: str, found: Mapping[int, TopK]) -> None:
    tensors = {}
    for number, top in found.items():
        tensors[f"{number}.token_ids"] = top.token_ids.to(torch.int32).contiguous()
        tensors[f"{number}.log_probs"] = top.log_probs.contiguous()
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFolderFailed(f"{path.parent} could not be made: {error.strerror}") from error
    write_durably(path, save(tensors, metadata={_KEY: about}))


def _read(path: Path, about: str) -> dict[int, TopK] | None:
    """A shard that is there and of the same conversations; anything else is made anew."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_KEY) != about:
                return None
            names = {int(name.partition(".")[0]) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {
                number: TopK(
                    file.get_tensor(f"{number}.token_ids").long(),
                    file.get_tensor(f"{number}.log_probs").clone(),
                )
                for number in names
            }
    except (OSError, SafetensorError):
        return None
