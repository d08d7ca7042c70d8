"""Loss per token, teacher-forced, through the engine's own packed forward pass: what is measured is what is served.

Runs on the calling thread, with the model to itself; called by `engine_in_process`. Rows are laid end to end
in packs of `PACK_TOKENS`, long rows in pieces, over a KV cache of its own that is gone afterwards. The test of
this module holds it against transformers' own attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prefix_store.artifact import Prefix
from server.engine.messages import ScheduledRow
from server.engine.sequence import Sequence as EngineSequence
from server.kvcache.block_pool import BlockPool
from server.kvcache.kv_cache import KVCache
from server.model.attention import make_attention_backend
from server.model.attention.base import PagedAttention
from server.model.forward_batch import build_forward_batch
from server.model.loader import LoadedModel
from server.types import GenerationRequest, SamplingParams
from trainer.metrics import Rows

PACK_TOKENS: Final = 512  # bounds the logits of a pass, [PACK_TOKENS, V] in float32
_BLOCK_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class TextToScore:
    """`target_token_ids` are predicted, each from everything before it; `context_token_ids` are only read."""

    context_token_ids: tuple[int, ...]
    target_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.context_token_ids, (
            "the first target is predicted from the last token of the context"
        )
        assert self.target_token_ids

    @property
    def fed(self) -> tuple[int, ...]:
        """What goes into the model: all but the last token, which is only predicted."""
        return (self.context_token_ids + self.target_token_ids)[:-1]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens `start`..`end - 1` of a text, in one pack with others."""

    text: int
    start: int
    end: int


def token_losses(
    model: LoadedModel, prefix: Prefix | None, texts: Sequence[TextToScore]
) -> list[Tensor]:
    """Nats of each target token, one float32 tensor [num targets] a text, in host memory.

    The model must be connectable: its attention is ours, as in serving.
    """
    packs = _packs([len(text.fed) for text in texts])
    cache, prefix_blocks, pool = _make_cache(model, prefix, texts, packs)
    attention = PagedAttention(make_attention_backend("auto", model.device), cache)
    losses: list[list[Tensor]] = [[] for _ in texts]
    blocks: dict[int, list[int]] = {}
    with torch.inference_mode(), model.connected(attention):
        if prefix is not None:
            cache.write_prefix(prefix_blocks, prefix)
        for pack in packs:
            for piece in pack:
                if piece.start == 0:
                    blocks[piece.text] = pool.allocate(pool.blocks_for(len(texts[piece.text].fed)))
            rows = [_row(texts[p.text], p, prefix, prefix_blocks, blocks[p.text]) for p in pack]
            for piece, nats in zip(
                pack, _run(model, cache, attention, rows, texts, pack), strict=True
            ):
                losses[piece.text].append(nats)
                if piece.end == len(texts[piece.text].fed):
                    pool.free(blocks.pop(piece.text))
    return [torch.cat(pieces) for pieces in losses]


def as_rows(losses: Sequence[Tensor]) -> Rows:
    """(nats, tokens) of each text: what `metrics.loss` and `metrics.perplexity` take."""
    return [(float(nats.double().sum()), float(len(nats))) for nats in losses]


def _run(
    model: LoadedModel,
    cache: KVCache,
    attention: PagedAttention,
    rows: Sequence[ScheduledRow],
    texts: Sequence[TextToScore],
    pack: Sequence[_Piece],
) -> list[Tensor]:
    """One forward pass; the losses of the targets that each piece predicts, perhaps none."""
    indices: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    first = 0
    for piece in pack:
        text = texts[piece.text]
        begin = max(piece.start, len(text.context_token_ids) - 1)
        wanted = range(begin, piece.end)  # token i predicts token i + 1
        indices += [first + i - piece.start for i in wanted]
        targets += [(text.context_token_ids + text.target_token_ids)[i + 1] for i in wanted]
        counts.append(len(wanted))
        first += piece.end - piece.start
    batch = build_forward_batch(rows, cache)
    where = torch.tensor(indices, dtype=torch.int64).to(model.device)
    attention.begin(batch)
    try:
        logits = model.logits(batch.input_ids, batch.position_ids, where)  # [len(indices), V]
    finally:
        attention.end()
    wanted_ids = torch.tensor(targets, dtype=torch.int64).to(model.device)
    nats = cross_entropy(logits.float(), wanted_ids, reduction="none").cpu()
    return list(torch.split(nats, counts))


def _packs(lengths: Sequence[int]) -> list[list[_Piece]]:
    """All texts in order, cut so that each pack has `PACK_TOKENS` tokens but the last."""
    packs: list[list[_Piece]] = []
    room = 0
    for text, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                packs.append([])
                room = PACK_TOKENS
            end = min(length, start + room)
            packs[-1].append(_Piece(text, start, end))
            room -= end - start
            start = end
    return packs


def _make_cache(
    model: LoadedModel,
    prefix: Prefix | None,
    texts: Sequence[TextToScore],
    packs: Sequence[Sequence[_Piece]],
) -> tuple[KVCache, list[int], BlockPool]:
    """A cache for the fullest pack: only its last text goes on in the next one. Block 0 stays zero."""

    def blocks_for(num_tokens: int) -> int:
        return -(-num_tokens // _BLOCK_SIZE)

    num_virtual_tokens = 0 if prefix is None else prefix.manifest.num_virtual_tokens
    needed = max(
        (sum(blocks_for(len(texts[piece.text].fed)) for piece in pack) for pack in packs), default=0
    )
    pool = BlockPool(2 + blocks_for(num_virtual_tokens) + needed, _BLOCK_SIZE)
    prefix_blocks = pool.allocate(blocks_for(num_virtual_tokens))
    return KVCache(model.layout, pool.num_blocks, _BLOCK_SIZE, model.device), prefix_blocks, pool


def _row(
    text: TextToScore,
    piece: _Piece,
    prefix: Prefix | None,
    prefix_blocks: Sequence[int],
    blocks: Sequence[int],
) -> ScheduledRow:
    request = GenerationRequest("likelihood", text.context_token_ids, SamplingParams())
    return ScheduledRow(
        sequence=EngineSequence(request, index=0, seed=0, arrival=0.0),
        token_ids=text.fed[piece.start : piece.end],
        start=piece.start,
        prefix_block_ids=tuple(prefix_blocks),
        num_virtual_tokens=0 if prefix is None else prefix.manifest.num_virtual_tokens,
        first_position=0 if prefix is None else prefix.manifest.first_position,
        block_ids=tuple(blocks),
        sample=False,
    )
