"""Trying a prefix out on the resident model before anyone can reach it.

Validation reads the file; this runs it. A *smoke* pass puts the candidate beside a row without a prefix: the
candidate's logits must be finite, and the row beside it must stay what it is without the candidate, to the
bit, so a prefix can harm nobody's answers but its own. If the artifact carries a *probe*, a second pass must
give the log-probabilities that its maker saw, which is the only check that would notice a wrong layout, wrong
positions or a wrong base of the same shape.

`Prover.prepare` may run on any thread. `Trial.smoke` and `Trial.probe` run on the engine thread between two steps
(`AsyncEngine.run`), so that running requests wait for one short pass at a time; over a KV cache of its own. Called by
`engine.intake`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from prefix_store.artifact import Prefix
from prefix_store.errors import ProofFailed
from prefix_store.proof import Proof
from prefix_store.spec import Probe
from server.engine.messages import ScheduledRow
from server.engine.sequence import Sequence as EngineSequence
from server.errors import EngineOverloaded
from server.kvcache.kv_cache import KVCache
from server.model.attention.base import AttentionBackend, PagedAttention
from server.model.loader import LoadedModel
from server.model.runner import ModelRunner
from server.types import GenerationRequest, SamplingParams

_BLOCK_SIZE: Final = 16
_SMOKE_TOKENS: Final = 8  # fits one block
_PROBE_BLOCKS: Final = 4  # 64 tokens, the longest probe
# Largest difference of a log-probability, in nats, where the probe names none: what another order of sums and
# another dtype than the maker's may change.
_TOLERANCE: Final = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.3}
NUM_TOP: Final = 8


class Prover:
    """Tries prefixes on one model."""

    def __init__(self, model: LoadedModel, backend: AttentionBackend) -> None:
        self._model = model
        self._backend = backend
        self._undisturbed: dict[
            int, Tensor
        ] = {}  # by the neighbour's length: the null row's logits [V]

    def prepare(self, prefix: Prefix) -> Trial:
        """A trial with the prefix in a KV cache of its own. Raises `EngineOverloaded` for want of memory."""
        with _memory_or_later():
            return Trial(self._model, self._backend, prefix, self._undisturbed)


class Trial:
    """One prefix on trial: `smoke`, then `probe`."""

    def __init__(
        self,
        model: LoadedModel,
        backend: AttentionBackend,
        prefix: Prefix,
        undisturbed: dict[int, Tensor],
    ) -> None:
        self._pass = _Passes(model, backend, prefix)
        self._prefix = prefix
        self._layout = model.layout
        self._undisturbed = undisturbed
        self._limit = model.position_limit
        self._tokens = [(7919 * i + 1) % model.vocab_size for i in range(_SMOKE_TOKENS)]

    def smoke(self) -> None:
        """The first pass. Raises `ProofFailed`, or `EngineOverloaded` for want of memory."""
        with _memory_or_later():
            self._smoke()

    def probe(self) -> Proof:
        """The second pass, and what the trial showed. Raises as `smoke` does."""
        probe = self._prefix.manifest.probe
        if probe is None:
            return Proof()
        tolerance = probe.tolerance or _TOLERANCE[self._layout.dtype]
        with _memory_or_later():
            return Proof(self._reproduced(probe, tolerance), tolerance)

    def _smoke(self) -> None:
        # The last positions of a model may leave room for fewer tokens than the trial would use.
        first, limit = self._prefix.manifest.first_position, self._limit
        count = _SMOKE_TOKENS if limit is None else min(_SMOKE_TOKENS, limit - first)
        null, tokens = self._tokens, self._tokens[:count]
        if (
            count not in self._undisturbed
        ):  # a pack of the same shape, or its sums might run in another order
            alone = self._pass.logits([(null, False), (tokens, False)])
            self._undisturbed[count] = alone[0].clone()
        expected = self._undisturbed[count]
        logits = self._pass.logits([(null, False), (tokens, True)])
        if not bool(logits[1].isfinite()[expected.isfinite()].all()):
            raise ProofFailed.at(
                "/tensors",
                "the base model's logits with this prefix are NaN or infinite, although each of its values "
                "is finite: the values are too large to compute attention with",
            )
        if not torch.equal(logits[0], expected):
            raise ProofFailed.at(
                "/tensors",
                "a request without a prefix gets other logits when it runs beside this prefix",
            )

    def _reproduced(self, probe: Probe, tolerance: float) -> float:
        """The largest difference found. Raises `ProofFailed` beyond the tolerance."""
        logits = self._pass.logits([(probe.input_ids, True)])[0]
        found = logits.float().log_softmax(dim=-1).cpu()
        expected = torch.tensor(probe.top_logprobs)
        differences = (found[list(probe.top_ids)] - expected).abs()
        # A token that the probe does not list is less probable than all that it lists.
        others = found.index_fill(0, torch.tensor(probe.top_ids), float("-inf"))
        surplus = (others.max() - expected.min()).clamp_min(0)
        worst = float(torch.maximum(differences.max(), surplus))
        if worst > tolerance:
            at = int(differences.argmax())
            raise ProofFailed.at(
                "/manifest/probe",
                f"the probe is not reproduced: token {probe.top_ids[at]} was expected at "
                f"{probe.top_logprobs[at]:.4f} nats and came at {float(found[probe.top_ids[at]]):.4f}, the most "
                f"probable token was expected to be {_first(probe)} and is {int(found.argmax())}; differences "
                f"of up to {tolerance:g} are allowed, {worst:.4g} was found. The base model, its positions or "
                "the layout of the prefix differ from those where it was made",
            )
        return worst


def _first(probe: Probe) -> int:
    best = max(range(len(probe.top_ids)), key=lambda i: probe.top_logprobs[i])
    return probe.top_ids[best]


def make_probe(
    model: LoadedModel, backend: AttentionBackend, prefix: Prefix, input_ids: Sequence[int]
) -> Probe:
    """The probe that `prefix`, as it is stored, passes on `model` for these 1 to 64 tokens."""
    logits = _Passes(model, backend, prefix).logits([(input_ids, True)])[0]
    top = logits.float().log_softmax(dim=-1).topk(min(NUM_TOP, logits.shape[-1]))
    return Probe(
        input_ids=tuple(input_ids),
        top_ids=tuple(top.indices.tolist()),
        top_logprobs=tuple(min(value, 0.0) for value in top.values.tolist()),
    )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Who has which blocks: the prefix its own, and row r `_PROBE_BLOCKS` more."""

    prefix: tuple[int, ...]

    def of_row(self, row: int) -> tuple[int, ...]:
        first = 1 + len(self.prefix) + row * _PROBE_BLOCKS
        return tuple(range(first, first + _PROBE_BLOCKS))


class _Passes:
    """Forward passes of up to two short rows, with or without the prefix, through our own attention."""

    def __init__(self, model: LoadedModel, backend: AttentionBackend, prefix: Prefix) -> None:
        self._model = model
        self._manifest = prefix.manifest
        num_blocks = -(-prefix.manifest.num_virtual_tokens // _BLOCK_SIZE)
        self._blocks = _Blocks(tuple(range(1, num_blocks + 1)))
        total = 1 + num_blocks + 2 * _PROBE_BLOCKS  # block 0 stays zero, as in every pool
        self._cache = KVCache(model.layout, total, _BLOCK_SIZE, model.device)
        self._attention = PagedAttention(backend, self._cache)
        self._runner = ModelRunner(model, self._cache, self._attention)
        with torch.inference_mode():
            self._cache.write_prefix(self._blocks.prefix, prefix.to(model.layout.dtype))

    def logits(self, rows: Sequence[tuple[Sequence[int], bool]]) -> Tensor:
        """Logits [rows, V] at the last token of each (token ids, with the prefix?)."""
        planned = [self._row(index, *row) for index, row in enumerate(rows)]
        with self._model.connected(self._attention):
            return self._runner.forward(tuple(planned))

    def _row(self, index: int, token_ids: Sequence[int], with_prefix: bool) -> ScheduledRow:
        request = GenerationRequest("trial", tuple(token_ids), SamplingParams())
        return ScheduledRow(
            sequence=EngineSequence(request, index=index, seed=0, arrival=0.0),
            token_ids=tuple(token_ids),
            start=0,
            prefix_block_ids=self._blocks.prefix if with_prefix else (),
            num_virtual_tokens=self._manifest.num_virtual_tokens if with_prefix else 0,
            first_position=self._manifest.first_position if with_prefix else 0,
            block_ids=self._blocks.of_row(index),
            sample=True,
        )


@contextlib.contextmanager
def _memory_or_later() -> Iterator[None]:
    """Device memory that is short now may be there again later; the requests that run are not harmed."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise EngineOverloaded(
            "there is not enough device memory to try the prefix out now; upload it again later"
        ) from None
