"""One contract for all attention backends, and the independence of a row from its batch, to the bit.

Expected values are computed here from a plain list of keys, without slots, blocks, masks or `reference`.
"""

# ruff: noqa: N803, N806 - shape letters (P, H, D) are the field's notation

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from prefix_store.spec import KVLayout, LayerLayout
from server.engine.messages import ScheduledRow
from server.engine.sequence import Sequence
from server.errors import ConfigError
from server.kvcache.kv_cache import KVCache, LayerKV
from server.model.attention import ATTENTION_BACKENDS, make_attention_backend
from server.model.attention.base import AttentionParams
from server.model.attention.sdpa import attend_together
from server.model.forward_batch import build_forward_batch
from server.types import GenerationRequest, SamplingParams
from tests.kernel_support import device_of, needs_triton

BACKENDS = [
    pytest.param(name, marks=needs_triton) if name == "triton" else name
    for name in ATTENTION_BACKENDS
]
BLOCK_SIZE = 16
# num query heads, num kv heads, key dim, value dim
SHAPES = [(4, 4, 8, 8), (14, 2, 16, 16), (8, 1, 64, 64), (6, 3, 32, 16), (4, 2, 16, 48)]


@dataclass(frozen=True)
class Row:
    """P virtual tokens, `before` own tokens in the cache, n new ones. Rows of one P and task share a prefix."""

    P: int
    before: int
    n: int
    task: str | None = None

    @property
    def kv_len(self) -> int:
        return self.P + self.before + self.n


MIX = [Row(0, 0, 5), Row(1, 40, 1), Row(37, 0, 20), Row(130, 3, 1), Row(0, 99, 1), Row(37, 17, 4)]
MIX += [Row(37, 3, 1, "a"), Row(130, 30, 1, "b"), Row(37, 260, 1, "a"), Row(37, 40, 2, "a")]


@dataclass
class Case:
    """Rows laid into a pool in random blocks; what each row's keys are is kept beside it."""

    rows: Sequence_[Row]
    shape: tuple[int, int, int, int]
    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        Hq, H, Dk, Dv = self.shape
        self.keys, self.values, self.queries = [], [], []
        for row in self.rows:
            # A row's content depends on the row only, so that it can be met again in another batch.
            g = torch.Generator().manual_seed(hash((row.P, row.before, row.n, self.seed)) % 2**31)
            self.keys.append(torch.randn(row.kv_len, H, Dk, generator=g).to(self.dtype))
            self.values.append(torch.randn(row.kv_len, H, Dv, generator=g).to(self.dtype))
            self.queries.append(torch.randn(row.n, Hq, Dk, generator=g).to(self.dtype))
            if row.task is not None:
                g.manual_seed(int.from_bytes(row.task.encode()) + row.P)
                self.keys[-1][: row.P] = torch.randn(row.P, H, Dk, generator=g)
                self.values[-1][: row.P] = torch.randn(row.P, H, Dv, generator=g)
        layout = KVLayout((LayerLayout(H, Dk, Dv, None),), str(self.dtype).removeprefix("torch."))
        num_blocks = 1 + sum(_blocks(r.P) + _blocks(r.before + r.n) for r in self.rows)
        free = list(range(1, num_blocks))
        random.Random(self.seed).shuffle(free)
        cache = KVCache(layout, num_blocks, BLOCK_SIZE, self.device)
        cache.layers[0].keys[BLOCK_SIZE:] = math.nan  # what is not written must not be read
        cache.layers[0].values[BLOCK_SIZE:] = math.nan
        self._prefixes: dict[tuple[int, str], tuple[int, ...]] = {}
        plan = tuple(self._lay(cache, i, free) for i in range(len(self.rows)))
        self.batch = build_forward_batch(plan, cache)
        self.layer: LayerKV = cache.layers[0]

    def _lay(self, cache: KVCache, index: int, free: list[int]) -> ScheduledRow:
        row = self.rows[index]
        prefix = self._prefix_blocks(row, free)
        own = tuple(free.pop() for _ in range(_blocks(row.before + row.n)))
        slots = torch.cat([cache.slots(prefix, row.P), cache.slots(own, row.before + row.n)])
        keys, values = self.keys[index].to(self.device), self.values[index].to(self.device)
        cache.layers[0].write(slots.to(self.device), keys, values)
        request = GenerationRequest("r", (1,), SamplingParams())
        return ScheduledRow(
            sequence=Sequence(request, 0, 0, 0.0),
            token_ids=(1,) * row.n,
            start=row.before,
            prefix_block_ids=prefix,
            num_virtual_tokens=row.P,
            first_position=row.P,
            block_ids=own,
            sample=True,
        )

    def _prefix_blocks(self, row: Row, free: list[int]) -> tuple[int, ...]:
        """Blocks of its own for a row without a task, else those that the task's first row took."""
        taken = tuple(free.pop() for _ in range(_blocks(row.P)))
        return taken if row.task is None else self._prefixes.setdefault((row.P, row.task), taken)

    def run(self, backend: str, params: AttentionParams) -> list[Tensor]:
        """Output of each row."""
        attend = make_attention_backend(backend, self.device).attend
        queries = torch.cat(self.queries).to(self.device)
        if params.sinks is not None:
            params = replace(params, sinks=params.sinks.to(self.device))
        out = attend(queries, self.layer, params, self.batch).cpu()
        return list(torch.split(out, [row.n for row in self.rows]))

    def expected(self, params: AttentionParams) -> list[Tensor]:
        return [
            torch.stack([self._one(r, i, params) for i in range(row.n)])
            for r, row in enumerate(self.rows)
        ]

    def _one(self, r: int, i: int, params: AttentionParams) -> Tensor:
        """Token i of row r, head by head, in float64."""
        Hq, H, _, _ = self.shape
        row = self.rows[r]
        last = row.kv_len - row.n + i
        first = 0 if params.window is None else max(0, last - params.window + 1)
        heads = []
        for h in range(Hq):
            k = self.keys[r][first : last + 1, h * H // Hq].double()
            v = self.values[r][first : last + 1, h * H // Hq].double()
            scores = k @ self.queries[r][i, h].double() * params.scale
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            if params.sinks is not None:
                scores = torch.cat([scores, params.sinks[h : h + 1].double()])
            heads.append(scores.softmax(0)[: len(k)] @ v)
        return torch.stack(heads)


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def params_for(shape: tuple[int, int, int, int], feature: str) -> AttentionParams:
    scale = shape[2] ** -0.5
    match feature:
        case "window":
            return AttentionParams(scale, window=24)
        case "window of one":
            return AttentionParams(scale, window=1)
        case "softcap":
            return AttentionParams(scale, softcap=1.5)
        case "sinks":
            return AttentionParams(scale, sinks=torch.linspace(-2, 3, shape[0]))
        case "everything":
            return AttentionParams(0.3, 24, 1.5, torch.linspace(-2, 3, shape[0]))
    return AttentionParams(scale)


@pytest.mark.parametrize(
    "feature", ["plain", "window", "window of one", "softcap", "sinks", "everything"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_step_equals_attention_written_out(
    backend: str, shape: tuple[int, int, int, int], feature: str
) -> None:
    params = params_for(shape, feature)
    case = Case(MIX, shape, device=device_of(backend))

    for ours, expected in zip(case.run(backend, params), case.expected(params), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("feature", ["plain", "window", "window of one"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] == s[3]], ids=str)
def test_tokens_of_a_prompt_attended_together_equal_attention_written_out(
    shape: tuple[int, int, int, int], feature: str
) -> None:
    """What sdpa does on a GPU; on the CPU it attends one by one."""
    params = params_for(shape, feature)
    case = Case(MIX, shape)
    queries, expected = torch.cat(case.queries), case.expected(params)

    for index, row in enumerate(case.batch.rows):
        ours = attend_together(queries, case.layer, params, row)
        torch.testing.assert_close(ours.double(), expected[index], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("P", [0, 1, 37, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_chunks_equals_the_prompt_at_once(backend: str, P: int) -> None:
    shape = SHAPES[1]
    device = device_of(backend)
    whole = Case([Row(P, 0, 50)], shape, device=device)
    params = params_for(shape, "plain")
    (expected,) = whole.run(backend, params)
    for cut in (1, 16, 17, 49):
        case = Case([Row(P, cut, 50 - cut)], shape, device=device)
        case.layer.keys[case.batch.rows[0].kv_slots] = whole.keys[0].to(device)
        case.layer.values[case.batch.rows[0].kv_slots] = whole.values[0].to(device)
        case.queries[0] = whole.queries[0][cut:]
        (ours,) = case.run(backend, params)

        torch.testing.assert_close(ours, expected[cut:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature", ["plain", "window", "everything"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_row_is_the_same_to_the_bit_alone_and_in_any_batch(
    backend: str, shape: tuple[int, int, int, int], feature: str
) -> None:
    """The second promise: who else decodes in a step must not change a request's tokens."""
    params = params_for(shape, feature)
    device, num_batches = device_of(backend), 8 if backend != "triton" else 3
    lengths = [
        (0, 0),
        (0, 62),
        (0, 63),
        (1, 30),
        (37, 10),
        (37, 26),
        (130, 5),
        (130, 200),
        (5, 300),
    ]
    mine = [Row(P, before, 1) for P, before in lengths]
    mine += [Row(P, before, 1, "a") for P, before in ((37, 3), (37, 70), (130, 4), (130, 9))]
    alone = {row: Case([row], shape, device=device).run(backend, params)[0] for row in mine}
    rng = random.Random(1)
    for mates in range(1, 1 + num_batches):
        batch = [rng.choice([*mine, Row(0, 0, 7), Row(37, 4, 3)]) for _ in range(mates)]
        batch.insert(rng.randint(0, mates), rng.choice(mine))
        for row, out in zip(
            batch, Case(batch, shape, device=device).run(backend, params), strict=True
        ):
            if row.n == 1:
                assert torch.equal(out, alone[row]), f"{row} among {batch}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", ["plain", "window"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] == s[3]], ids=str)
def test_a_token_of_a_prompt_is_the_same_to_the_bit_however_the_prompt_is_cut(
    shape: tuple[int, int, int, int], feature: str, dtype: torch.dtype
) -> None:
    """Also in pieces of one token, which is how a token is decoded: a preempted request computes it in a prompt."""
    params, length = (
        params_for(shape, feature),
        700,
    )  # beyond the 512 keys that the kernel takes at once
    whole = Case([Row(37, 0, length)], shape, dtype=dtype)
    (expected,) = whole.run("sdpa", params)
    for start, stop in [
        (0, 1),
        (5, 6),
        (26, 27),
        (0, 27),
        (20, 90),
        (300, 301),
        (470, 520),
        (0, 699),
    ]:
        case = Case([Row(37, start, stop - start), Row(0, 12, 1)], shape, dtype=dtype)
        row = case.batch.rows[0]
        case.layer.keys[row.kv_slots] = whole.keys[0][: row.kv_len]
        case.layer.values[row.kv_slots] = whole.values[0][: row.kv_len]
        case.queries[0] = whole.queries[0][start:stop]
        ours = case.run("sdpa", params)[0]

        assert torch.equal(ours, expected[start:stop]), f"tokens {start} to {stop}"


def test_every_pair_of_lengths_shares_a_batch_without_a_trace() -> None:
    """Padding to a bucket must not reach the sums: 1..200 keys, each beside one of another length."""
    shape, params = SHAPES[1], params_for(SHAPES[1], "plain")
    rows = [Row(0, n, 1) for n in range(0, 200, 3)]
    alone = {row: Case([row], shape).run("sdpa", params)[0] for row in rows}
    for a, b in itertools.pairwise([*rows, *rows[::-7]]):
        first, second = Case([a, b], shape).run("sdpa", params)
        assert torch.equal(first, alone[a])
        assert torch.equal(second, alone[b])


def test_the_null_block_is_all_that_padding_reads() -> None:
    """All other unwritten slots are NaN in these tests; a NaN under a mask would poison its row."""
    case = Case([Row(0, 3, 1), Row(37, 20, 1)], SHAPES[0])
    out = case.run("sdpa", params_for(SHAPES[0], "plain"))

    assert all(bool(torch.isfinite(x).all()) for x in out)
    assert bool(torch.isnan(case.layer.keys).any()), "the pool was to be poisoned"


def test_an_unknown_backend_is_refused_with_the_valid_names() -> None:
    with pytest.raises(ConfigError, match="expected one of auto, reference, sdpa, triton"):
        make_attention_backend("flash")
