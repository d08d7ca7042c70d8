"""A runner that can not lie: KV memory is one 64-bit word per slot, and tokens are hashes of what is read.

Computing a token writes hash(token, position, word before it) through the row's block table; the next token
is a hash of every word of prefix and own tokens, read back through the tables. A wrong block, a stale slot,
a use after free, another prefix version or a block of another salt (each salt has words of its own here) changes
the tokens. `oracle` is the same function without batches, blocks or memory. Hashes of tuples of ints do not depend
on PYTHONHASHSEED.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from prefix_store.artifact import Prefix
from server.engine.messages import PrefixLoad, RowOutcome, ScheduledRow, SchedulerOutput
from server.engine.sequence import PENDING, Sequence
from server.kvcache.block_pool import BlockPool
from server.types import GenerationRequest, PrefixRef

VOCAB: Final = 61
EOS: Final = frozenset({7})
ROW_ERROR: Final = "this row was chosen to fail"
POISON: Final = -0x7EAD_7EAD_7EAD_7EAD
WIPED: Final = 0
_NOTHING_BEFORE: Final = 0x5EED


class RunnerBroke(Exception):
    """The fault that is injected into whole steps."""


@lru_cache(maxsize=4096)
def prefix_words(digest: str, num_virtual_tokens: int) -> tuple[int, ...]:
    """What the tensors of a prefix are here; as different as their digests."""
    content = int(digest.removeprefix("sha256:"), 16)
    return tuple(hash((content, i)) for i in range(num_virtual_tokens))


def word_of(token_id: int, position: int, before: int) -> int:
    """The K/V of one token: depends on all that stands before it."""
    return hash((token_id, position, before))


def salted(before: int, request: GenerationRequest) -> int:
    """What stands before the first own token: salts are numbers here, and count as one more word."""
    return hash((before, int(request.cache_salt)))


def next_token(words: Iterable[int], request: GenerationRequest, seed: int, num_output: int) -> int:
    """The "model": every word counts, the seed counts. Keeps `min_tokens`, as the sampler does."""
    token_id = hash((seed, *words)) % VOCAB
    if num_output < request.sampling.min_tokens:
        while token_id in EOS or token_id in request.sampling.stop_token_ids:
            token_id = (token_id + 1) % VOCAB
    return token_id


def oracle(request: GenerationRequest, index: int, seed: int) -> list[int]:
    """All tokens of one choice, generated alone."""
    ref, sampling = request.prefix, request.sampling
    words = list(prefix_words(ref.digest, ref.num_virtual_tokens)) if ref else []
    before = salted(words[-1] if words else _NOTHING_BEFORE, request)
    position = ref.first_position if ref else 0
    feed, output = list(request.prompt_token_ids), list[int]()
    while True:
        for token_id in feed:
            before = word_of(token_id, position, before)
            words.append(before)
            position += 1
        output.append(next_token(words, request, seed + index, len(output)))
        stops = output[-1] in sampling.stop_token_ids
        stops |= output[-1] in EOS and not sampling.ignore_eos
        if len(output) == sampling.max_tokens or (stops and len(output) > sampling.min_tokens):
            return output
        feed = output[-1:]


class PoisoningBlockPool(BlockPool):
    """The real pool; what is freed becomes unreadable at once."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.memory = array("q", [POISON]) * (num_blocks * block_size)

    def free(self, block_ids: Iterable[int]) -> None:
        freed = list(block_ids)
        super().free(freed)
        for block_id in freed:
            start = block_id * self.block_size
            self.memory[start : start + self.block_size] = array("q", [POISON]) * self.block_size


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step of which the engine does not ask yet how it ended."""

    ended: list[RowOutcome]
    check: Callable[[], None]

    def outcomes(self) -> list[RowOutcome]:
        self.check()
        return self.ended


def _nothing() -> None:
    """Most steps do not break."""


def _fed(row: ScheduledRow, tokens: Mapping[Sequence, int | None]) -> tuple[int, ...]:
    """The row's tokens, with what the step before has sampled; anything, if that has failed."""
    if row.token_ids[-1] != PENDING:
        return row.token_ids
    return (*row.token_ids[:-1], tokens.get(row.sequence) or 0)


class HashRunner:
    """Performs plans on `pool.memory`. Fails rows and whole steps at random, as often as it is told."""

    def __init__(
        self,
        pool: PoisoningBlockPool,
        faults: random.Random,
        row_error_rate: float = 0.0,
        step_error_rate: float = 0.0,
    ) -> None:
        self._memory = pool.memory
        self._block_size = pool.block_size
        self._faults = faults
        self.row_error_rate = row_error_rate
        self.step_error_rate = step_error_rate
        self.num_row_errors = 0
        self.num_step_errors = 0
        self._fed_back: dict[Sequence, int | None] = {}

    def launch(self, plan: SchedulerOutput, staged: Mapping[str, Prefix]) -> _Launched:
        """Performs the plan at once, as a device does in the end: one after the other, before what is freed later."""
        tokens = self._fed_back
        self._wipe(plan.wipe_block_ids)
        breaks = self._faults.random() < self.step_error_rate
        at_launch = self._faults.random() < 0.5
        for load in plan.prefix_loads:
            if not (breaks and self._faults.random() < 0.5):
                self._load(load, staged)
        outcomes = []
        for row in plan.rows:
            outcomes.append(self._run(row, _fed(row, tokens)))
            if breaks and self._faults.random() < 0.5:
                break
        self._fed_back = {r.sequence: o.token_id for r, o in zip(plan.rows, outcomes, strict=False)}
        if breaks and at_launch:
            self._break()
        return _Launched(outcomes, self._break if breaks else _nothing)

    def _break(self) -> None:
        self.num_step_errors += 1
        raise RunnerBroke

    def _load(self, load: PrefixLoad, staged: Mapping[str, Prefix]) -> None:
        prefix = staged[load.ref.digest]
        words = prefix_words(prefix.digest, prefix.manifest.num_virtual_tokens)
        for i, word in enumerate(words):
            self._memory[self._slot(load.block_ids, i)] = word

    def _run(self, row: ScheduledRow, token_ids: tuple[int, ...]) -> RowOutcome:
        before = self._word_before(row)
        for i, token_id in enumerate(token_ids, start=row.start):
            before = word_of(token_id, row.first_position + i, before)
            self._memory[self._slot(row.block_ids, i)] = before
        if self._faults.random() < self.row_error_rate:
            self.num_row_errors += 1
            return RowOutcome(error=ROW_ERROR)
        if not row.sample:
            return RowOutcome()
        words = self._read(row.prefix_block_ids, row.num_virtual_tokens)
        words += self._read(row.block_ids, row.start + len(row.token_ids))
        seq = row.sequence
        return RowOutcome(next_token(words, seq.request, seq.seed, len(seq.output_token_ids)))

    def _word_before(self, row: ScheduledRow) -> int:
        if row.start > 0:
            return self._memory[self._slot(row.block_ids, row.start - 1)]
        request, last = row.sequence.request, row.num_virtual_tokens - 1
        if last < 0:
            return salted(_NOTHING_BEFORE, request)
        return salted(self._memory[self._slot(row.prefix_block_ids, last)], request)

    def _wipe(self, block_ids: tuple[int, ...]) -> None:
        """As `ModelRunner` does with blocks of a row that failed."""
        for block_id in block_ids:
            start = block_id * self._block_size
            self._memory[start : start + self._block_size] = array("q", [WIPED]) * self._block_size

    def _slot(self, block_ids: tuple[int, ...], index: int) -> int:
        return block_ids[index // self._block_size] * self._block_size + index % self._block_size

    def _read(self, block_ids: tuple[int, ...], count: int) -> array[int]:
        words, size = array("q"), self._block_size
        for block_id in block_ids:
            words += self._memory[block_id * size : (block_id + 1) * size]
        assert len(words) >= count, "the block table is too short for the row's tokens"
        return words[:count]


def random_ref(rng: random.Random, number: int, max_virtual_tokens: int) -> PrefixRef:
    """A version of a task: few task names and many digests, so that a key by name would be found out."""
    num_virtual_tokens = rng.randint(1, max_virtual_tokens)
    return PrefixRef(
        task=f"task{number % 3}",
        version=number // 3 + 1,
        digest=f"sha256:{rng.getrandbits(256):064x}",
        num_virtual_tokens=num_virtual_tokens,
        first_position=rng.choice([num_virtual_tokens, num_virtual_tokens, 0]),
    )
