"""The largest step that can ever be planned, to be run at start: what it needs is then known, and is there.

Run on the main thread before the engine starts; called by `server.sizing` over two blocks of its own, to be measured, and by
`server.bootstrap` through the runner and the pool that will serve. All rows read and write one block, as often as
their length asks for, so that the longest context needs no pool that holds it. Nothing is left behind: the block is
zeroed, nothing is drawn from torch's generators, and no metric sees it.

Two plans, because memory peaks in different places: rows that decode, each behind as many keys as the pool could give it,
beside a prompt behind the longest context; and as many prompts as there may be rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import torch

from server.engine.messages import MAX_TOLD_TOKENS, ScheduledRow, SchedulerOutput
from server.engine.sequence import Sequence
from server.kvcache.kv_cache import KVCache
from server.model.loader import LoadedModel
from server.model.runner import ModelRunner
from server.types import MAX_LOGPROBS, GenerationRequest, SamplingParams

_PREFIX_LEN: Final = 32  # as long as backends need to treat it as shared
# Everything that takes memory: the penalties' counts, the sorted vocabulary of top-p, the copies between.
_ALL_OPTIONS: Final = SamplingParams(
    max_tokens=2,
    min_tokens=2,
    temperature=1.0,
    top_k=2**10,
    top_p=0.9,
    min_p=1e-6,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias=((0, 0.1),),
    logprobs=MAX_LOGPROBS,
    prompt_logprobs=MAX_LOGPROBS,
)
# Multiply-adds of a run on a CPU: tenths of a second on two cores, for which a step is made 16 times smaller at most, as
# the part of its memory that does not shrink is then taken as often; and what a larger model may make of it, a second or two.
_CPU_WORK: Final = 10**9
_MOST_TIMES: Final = 16
_CPU_WORK_AT_MOST: Final = 2 * 10**10


@dataclass(frozen=True, slots=True)
class LargestStep:
    """`num_tokens` own tokens in `num_rows` rows, each behind up to `kv_len` keys and one behind `max_kv_len`.

    `times`: by how much a step was made smaller in tokens and rows. What it takes is proportional to these but for a part that
    does not grow, so `times` as much is enough for the whole.
    """

    num_tokens: int
    num_rows: int
    kv_len: int
    max_kv_len: int
    times: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.num_rows <= self.num_tokens
        assert 1 <= self.kv_len <= self.max_kv_len

    def made_smaller(self, times: int) -> LargestStep:
        """A `times`-th of the tokens and rows, behind the same contexts."""
        return dataclasses.replace(
            self,
            num_tokens=-(-self.num_tokens // times),
            num_rows=-(-self.num_rows // times),
            times=times,
        )

    def num_products(self, model: LoadedModel) -> int:
        """Multiply-adds of both plans, near enough."""
        layout = model.layout
        num_weights: int = model.weight_bytes // getattr(torch, layout.dtype).itemsize
        seen = self.num_rows * self.kv_len + self.num_tokens * (self.max_kv_len + self.kv_len)
        per_key = sum(
            (model.num_attention_heads or layer.num_kv_heads) * (layer.key_dim + layer.value_dim)
            for layer in layout.layers
        )
        return 2 * self.num_tokens * num_weights + seen * per_key


def largest_step(
    model: LoadedModel,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    max_num_virtual_tokens: int,
    pool_tokens: int,
) -> LargestStep:
    """Behind a pool of `pool_tokens`; on a CPU a part of it that does not take long.

    All rows may share the longest prefix, and of the rest of the pool each has its part.
    """
    kv_len = min(max_model_len, max_num_virtual_tokens + max(1, pool_tokens // max_num_seqs))
    step = LargestStep(max_num_batched_tokens, max_num_seqs, kv_len, max_model_len)
    return _for_a_cpu(step, model) if model.device.type == "cpu" else step


def _for_a_cpu(step: LargestStep, model: LoadedModel) -> LargestStep:
    times = 1
    while times < step.num_rows:
        work = step.made_smaller(times).num_products(model)
        if work <= (_CPU_WORK if times < _MOST_TIMES else _CPU_WORK_AT_MOST):
            break
        times *= 2
    return step.made_smaller(min(times, step.num_rows))


def run_largest_step(runner: ModelRunner, kv_cache: KVCache, step: LargestStep) -> None:
    """Both plans, one after the other, in the pool's last block, which is zero afterwards. The engine does not run yet."""
    # The last, because addresses are largest there.
    block = kv_cache.num_blocks - 1
    assert block > 0, "block 0 stays zero"
    try:
        for plan in largest_plans(step, block, kv_cache.block_size):
            runner.launch(plan, {}).outcomes()
    finally:
        with torch.inference_mode():
            kv_cache.zero_blocks((block,))


def largest_plans(step: LargestStep, block: int, block_size: int) -> tuple[SchedulerOutput, ...]:
    """The plans of a step, every row of which reads and writes `block` alone."""
    prefix_len = min(_PREFIX_LEN, step.max_kv_len // 2)

    def row(num_tokens: int, kv_len: int, num_told: int = 0) -> ScheduledRow:
        row = _row(num_tokens, max(kv_len, prefix_len + num_tokens), prefix_len, block, block_size)
        told = (0,) * min(num_told, num_tokens)
        return dataclasses.replace(row, told_from=row.start, told_token_ids=told)

    room = step.max_kv_len - prefix_len  # the most own tokens of one row
    decoding = step.num_rows - 1
    rest = min(step.num_tokens - decoding, room)
    mixed = [row(1, step.kv_len) for _ in range(decoding)] + [
        row(rest, step.max_kv_len, -(-MAX_TOLD_TOKENS // step.times))
    ]
    num_prompts = max(1, min(step.num_rows, step.num_tokens // 2))
    each = min(step.num_tokens // num_prompts, room)
    prompts = [row(each, step.kv_len) for _ in range(num_prompts)]
    return tuple(SchedulerOutput((), (), tuple(rows), 0) for rows in (mixed, prompts))


def _row(
    num_tokens: int, kv_len: int, prefix_len: int, block: int, block_size: int
) -> ScheduledRow:
    """The last `num_tokens` of `kv_len` keys, of which the first are a prefix."""
    request = GenerationRequest("largest-step", (0,), _ALL_OPTIONS)
    own_len = kv_len - prefix_len
    return ScheduledRow(
        sequence=Sequence(request, index=0, seed=0, arrival=0.0, output_token_ids=[0]),
        token_ids=(0,) * num_tokens,
        start=own_len - num_tokens,
        prefix_block_ids=(block,) * -(-prefix_len // block_size),
        num_virtual_tokens=prefix_len,
        first_position=prefix_len,
        block_ids=(block,) * -(-own_len // block_size),
        sample=True,
    )
