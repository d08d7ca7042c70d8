"""Bugs to plant, one after the other: the simulation must find each of them.

Each is a small change of the real code, made by replacing one method, of the kind that servers like this
have had. `plant` is given a `pytest.MonkeyPatch`, so that nothing stays behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import pytest

from server.engine.core import EngineCore
from server.engine.messages import EvictPrefix, PrefixReady, RowOutcome
from server.engine.prefix_loads import PrefixLoads
from server.engine.scheduler import Scheduler
from server.engine.sequence import PENDING, Sequence, SequenceStatus
from server.engine.step_plan import StepPlan
from server.kvcache.block_pool import BlockPool
from server.kvcache.pins import Pin, Pins
from server.kvcache.prompt_cache import BlockChain, PromptCache
from server.kvcache.resident_prefixes import ResidentPrefix, ResidentPrefixes

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTED_BUGS: Final[dict[str, Plant]] = {}


def _bug(cls: type, method: str) -> Callable[[Callable[..., Any]], None]:
    """Registers a replacement of `cls.method`; it gets the original as its first argument."""

    def register(replacement: Callable[..., Any]) -> None:
        original = cls.__dict__[method]
        if isinstance(original, property):

            def read(self: Any) -> Any:
                return replacement(original.fget, self)

            patched: Any = property(read)
        else:

            def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
                return replacement(original, self, *args, **kwargs)

        PLANTED_BUGS[replacement.__name__] = lambda patch: patch.setattr(cls, method, patched)

    return register


# ---- blocks ------------------------------------------------------------------------------------


@_bug(BlockPool, "blocks_for")
def block_count_is_rounded_down(original: Any, pool: Any, num_tokens: int) -> int:
    return max(1, num_tokens // int(pool.block_size))


@_bug(BlockPool, "blocks_for")
def one_block_more_at_each_full_block(original: Any, pool: Any, num_tokens: int) -> int:
    return num_tokens // int(pool.block_size) + 1


@_bug(BlockPool, "free")
def blocks_are_handed_out_without_being_marked_used(original: Any, pool: Any, ids: Any) -> None:
    pool._free.extendleft(reversed(ids := list(ids)))
    pool._used.difference_update(ids[1:])


@_bug(BlockPool, "allocate")
def a_block_is_handed_out_twice(original: Any, pool: Any, count: int) -> Any:
    taken = original(pool, count)
    if len(taken) > 2:
        taken[-1] = taken[0]
    return taken


@_bug(Scheduler, "_give_back")
def finished_sequence_frees_its_blocks_twice(original: Any, scheduler: Any, seq: Sequence) -> None:
    scheduler._blocks.free(seq.block_table)
    original(scheduler, seq)


@_bug(Scheduler, "_give_back")
def blocks_of_an_aborted_prefill_stay(original: Any, scheduler: Any, seq: Sequence) -> None:
    if seq.output_token_ids:
        original(scheduler, seq)
    else:
        scheduler._release(seq)


# ---- prefixes ----------------------------------------------------------------------------------


@_bug(Scheduler, "_release")
def preempted_sequence_keeps_its_lease(original: Any, scheduler: Any, seq: Sequence) -> None:
    if seq.num_computed_tokens == seq.num_tokens:
        original(scheduler, seq)
    seq.lease = None


@_bug(Scheduler, "_release")
def lease_is_not_released_when_there_is_no_room(
    original: Any, scheduler: Any, seq: Sequence
) -> None:
    if seq.status is SequenceStatus.RUNNING:
        original(scheduler, seq)


@_bug(ResidentPrefixes, "make_room")
def leased_prefix_is_evicted(original: Any, prefixes: Any, num_blocks: int) -> None:
    for entry in prefixes.entries():
        if prefixes._blocks.num_free >= num_blocks:
            break
        del prefixes._entries[entry.ref.digest]
        prefixes._blocks.free(entry.block_ids)
        prefixes._evicted.append(entry)


@_bug(ResidentPrefix, "evictable")
def pinned_prefix_is_evicted(original: Any, entry: ResidentPrefix) -> bool:
    return entry.num_leases == 0


@_bug(ResidentPrefixes, "acquire")
def prefix_is_found_by_the_name_of_its_task(original: Any, prefixes: Any, digest: str) -> Any:
    task = prefixes._entries[digest].ref.task
    return original(
        prefixes, next(d for d, entry in prefixes._entries.items() if entry.ref.task == task)
    )


@_bug(ResidentPrefixes, "retire")
def retired_prefix_is_evicted_under_its_readers(original: Any, prefixes: Any, digest: str) -> None:
    entry = prefixes._entries.pop(digest, None)
    if entry is not None:
        prefixes._blocks.free(entry.block_ids)


@_bug(ResidentPrefixes, "release")
def retired_prefix_is_forgotten(original: Any, prefixes: Any, lease: Any) -> None:
    lease.released = True
    lease.resident.num_leases -= 1


@_bug(Scheduler, "fail")
def prefix_of_a_failed_step_is_trusted(original: Any, scheduler: Any, plan: Any, error: str) -> Any:
    return scheduler.commit(plan, [RowOutcome(error=error)] * len(plan.rows))


@_bug(Scheduler, "_reserve")
def prefix_loads_are_skipped(original: Any, scheduler: Any, ref: Any, step: Any) -> None:
    original(scheduler, ref, step)
    if len(scheduler._running) > 1:
        step.prefix_loads.pop()


@_bug(Scheduler, "_reserve")
def pin_is_forgotten(original: Any, scheduler: Any, ref: Any, step: Any) -> None:
    original(scheduler, ref, step)
    scheduler._prefixes.unpin(ref.digest)


@_bug(Pins, "expire")
def pin_never_expires(original: Any, pins: Any, now: float) -> None:
    pass


@_bug(Pins, "pin")
def pin_budget_is_not_asked(original: Any, pins: Any, ref: Any, expires_at: Any) -> Any:
    pins._replace({**pins._pins, ref.task: Pin(ref, expires_at)})
    return pins._state(None)


@_bug(Pins, "follow")
def pin_stays_with_the_old_version(original: Any, pins: Any, ref: Any) -> Any:
    return pins._state(None) if ref.task in pins._pins else None


@_bug(PrefixLoads, "may_request")
def prefix_is_asked_for_twice(original: Any, loads: Any, digest: str) -> bool:
    return True


@_bug(PrefixLoads, "keep_only")
def staged_prefix_is_kept_when_nobody_wants_it(original: Any, loads: Any, digests: Any) -> None:
    pass


@_bug(Scheduler, "_prefix_failed")
def failed_load_ends_only_the_first_that_waits(
    original: Any, scheduler: Any, digest: str, reason: str
) -> None:
    kept = [s for s in scheduler._waiting if s.digest == digest][1:]
    scheduler._waiting = [s for s in scheduler._waiting if s not in kept]
    original(scheduler, digest, reason)
    scheduler._waiting = sorted([*scheduler._waiting, *kept], key=scheduler._order.__getitem__)
    scheduler._loads.loading.update({digest} if kept else ())


@_bug(Scheduler, "has_work")
def sleeps_while_a_prefix_could_be_asked_for(original: Any, scheduler: Any) -> bool:
    """As it was until the simulation found it."""
    if scheduler._running or scheduler._ended:
        return True
    return any(s.digest is None or scheduler._loads.at_hand(s.digest) for s in scheduler._waiting)


# ---- the prompt cache --------------------------------------------------------------------------


def _begin_with(seq: Sequence, **parts: Any) -> None:
    ref = seq.request.prefix
    known = {
        "salt": seq.request.cache_salt,
        "digest": seq.digest,
        "first_position": ref.first_position if ref else 0,
    }
    seq.chain = BlockChain.begin(**(known | parts))


@_bug(Sequence, "__post_init__")
def cached_blocks_are_found_across_salts(original: Any, seq: Sequence) -> None:
    _begin_with(seq, salt="")


@_bug(Sequence, "__post_init__")
def cached_blocks_are_found_across_prefixes(original: Any, seq: Sequence) -> None:
    _begin_with(seq, digest=None)


@_bug(Sequence, "__post_init__")
def cached_blocks_are_found_by_the_name_of_the_task(original: Any, seq: Sequence) -> None:
    _begin_with(seq, digest=seq.request.prefix.task if seq.request.prefix else None)


@_bug(BlockChain, "key")
def key_is_of_the_blocks_own_tokens_only(
    original: Any, chain: Any, index: int, tokens: Any, size: int
) -> Any:
    start = index * size
    root = BlockChain(chain.keys[:1])
    found = original(root, 0, lambda a, b: tokens(start + a, start + b), size)
    chain.keys[index + 1 :] = [found]
    return found


@_bug(Scheduler, "_reuse")
def last_token_is_served_from_the_cache(original: Any, scheduler: Any, seq: Sequence) -> int:
    size, before = scheduler._blocks.block_size, seq.num_computed_tokens
    leased = scheduler._prompt_cache.reuse(
        seq.chain, seq.block_table, seq.token_ids, seq.num_tokens // size
    )
    seq.num_computed_tokens = max(before, leased * size)
    return seq.num_computed_tokens - before


@_bug(Scheduler, "_admit")
def blocks_are_cached_before_they_are_computed(
    original: Any, scheduler: Any, seq: Sequence, step: Any, now: float
) -> bool:
    admitted: bool = original(scheduler, seq, step, now)
    if admitted:
        num_full = seq.num_tokens // scheduler._blocks.block_size
        scheduler._prompt_cache.enter(seq.chain, seq.block_table, seq.token_ids, num_full)
    return admitted


@_bug(Scheduler, "_admit")
def reused_tokens_are_counted_one_block_too_many(
    original: Any, scheduler: Any, seq: Sequence, step: Any, now: float
) -> bool:
    admitted: bool = original(scheduler, seq, step, now)
    row = step.rows.get(seq)
    if admitted and row is not None and seq.chain.blocks and len(row.token_ids) > 1:
        step.rows[seq] = dataclasses.replace(row, start=row.start + 1, token_ids=row.token_ids[1:])
    return admitted


@_bug(Scheduler, "_commit_row")
def failed_row_leaves_its_blocks_in_the_cache(
    original: Any, scheduler: Any, row: Any, outcome: RowOutcome
) -> Any:
    output = original(scheduler, row, outcome)
    if outcome.error is not None:
        seq, size = row.sequence, scheduler._blocks.block_size
        num_full = min((row.start + len(row.token_ids)) // size, scheduler._blocks.num_free)
        table = scheduler._blocks.allocate(num_full)
        scheduler._prompt_cache.enter(seq.chain, table, seq.token_ids, num_full)
        scheduler._prompt_cache.give_back(seq.chain, table)
    return output


@_bug(PromptCache, "drop")
def what_a_failed_row_read_stays_in_the_cache(original: Any, cache: Any, chain: Any) -> None:
    pass


@_bug(PromptCache, "drop")
def dropped_blocks_are_freed_under_their_readers(original: Any, cache: Any, chain: Any) -> None:
    original(cache, chain)
    for entry in cache._dropped:
        cache._blocks.free([entry.block_id])
    cache._dropped.clear()


@_bug(PromptCache, "drop")
def what_stands_on_dropped_blocks_stays(original: Any, cache: Any, chain: Any) -> None:
    for entry in chain.blocks:
        for child in set(entry.children.values()) - set(chain.blocks):
            del entry.children[child.key]
    original(cache, chain)


@_bug(PromptCache, "_is_cut_off")
def blocks_are_cached_behind_dropped_ones(original: Any, cache: Any, chain: Any) -> bool:
    return False


@_bug(PromptCache, "give_back")
def shared_blocks_are_freed_with_their_first_reader(
    original: Any, cache: Any, chain: Any, table: Any
) -> None:
    cache._blocks.free(table)
    table.clear()
    while chain.blocks:
        cache._release(chain.blocks.pop())


@_bug(PromptCache, "give_back")
def leases_on_cached_blocks_are_kept(original: Any, cache: Any, chain: Any, table: Any) -> None:
    cache._blocks.free(table[len(chain.blocks) :])
    table.clear()
    chain.blocks.clear()


@_bug(PromptCache, "_release")
def a_block_counts_as_idle_while_another_reads_it(original: Any, cache: Any, entry: Any) -> None:
    original(cache, entry)
    if not entry.dropped:
        cache._idle[entry.key] = entry


@_bug(PromptCache, "make_room")
def evicted_block_can_still_be_found(original: Any, cache: Any, num_blocks: int) -> None:
    before = dict(cache._entries)
    original(cache, num_blocks)
    cache._entries.update(before)


@_bug(PromptCache, "make_room")
def newest_blocks_are_evicted_first(original: Any, cache: Any, num_blocks: int) -> None:
    while cache._idle and cache._blocks.num_free < num_blocks:
        key, entry = cache._idle.popitem(last=True)
        del cache._entries[key]
        if entry.parent is not None:
            entry.parent.children.remove(entry)
        cache._blocks.free([entry.block_id])


@_bug(PromptCache, "num_evictable_blocks")
def blocks_that_are_read_count_as_room(original: Any, cache: Any) -> int:
    return len(cache._entries)


@_bug(PromptCache, "_lease")
def own_block_is_kept_beside_the_cached_one(
    original: Any, cache: Any, entry: Any, chain: Any, table: Any
) -> None:
    index = len(chain.blocks)
    own = table[index : index + 1]
    entry.num_leases += 1
    cache._idle.pop(entry.key, None)
    chain.blocks.append(entry)
    table[index : index + 1] = own or [entry.block_id]


@_bug(Scheduler, "_end_failed")
def cached_blocks_are_wiped_when_a_reader_fails(
    original: Any, scheduler: Any, seq: Sequence, error: str
) -> Any:
    scheduler._wipe_block_ids += seq.block_table
    return original(scheduler, seq, error)


@_bug(Scheduler, "_is_anticipated")
def everyone_waits_for_a_block_that_nobody_computes(
    original: Any, scheduler: Any, seq: Sequence, step: Any
) -> bool:
    num_blocks = (seq.num_tokens - 1) // scheduler._blocks.block_size
    return scheduler._prompt_cache.missing_key(seq.chain, seq.token_ids, num_blocks) is not None


@_bug(Scheduler, "_reuse")
def hits_are_counted_again_at_each_try(original: Any, scheduler: Any, seq: Sequence) -> int:
    num_reused: int = original(scheduler, seq)
    seq.num_cached_tokens += num_reused
    return num_reused


# ---- sequences ---------------------------------------------------------------------------------


@_bug(Scheduler, "_preempt")
def preempted_sequence_thinks_it_is_computed(
    original: Any, scheduler: Any, seq: Sequence, step: Any
) -> None:
    num_computed_tokens = seq.num_computed_tokens
    original(scheduler, seq, step)
    seq.num_computed_tokens = num_computed_tokens


@_bug(Scheduler, "_preempt")
def preempted_sequence_loses_its_output(
    original: Any, scheduler: Any, seq: Sequence, step: Any
) -> None:
    original(scheduler, seq, step)
    seq.output_token_ids.clear()


@_bug(Scheduler, "_preempt")
def row_of_a_preempted_sequence_still_runs(
    original: Any, scheduler: Any, seq: Sequence, step: Any
) -> None:
    row = step.rows.get(seq)
    original(scheduler, seq, step)
    if row is not None:
        step.rows[seq] = row


@_bug(Scheduler, "_live")
def abort_forgets_the_waiting(original: Any, scheduler: Any, request_id: str, index: Any) -> Any:
    return [s for s in original(scheduler, request_id, index) if s in scheduler._running]


@_bug(Scheduler, "_live")
def abort_of_one_choice_ends_all(original: Any, scheduler: Any, request_id: str, index: Any) -> Any:
    return original(scheduler, request_id, None)


@_bug(Scheduler, "_end")
def last_output_is_given_twice(
    original: Any, scheduler: Any, seq: Sequence, *a: Any, **k: Any
) -> Any:
    output = original(scheduler, seq, *a, **k)
    if seq.num_preemptions:
        scheduler._ended.append(output)
    return output


@_bug(Sequence, "finish_reason")
def max_tokens_is_off_by_one(original: Any, seq: Sequence, eos_token_ids: Any) -> Any:
    if len(seq.output_token_ids) == seq.request.sampling.max_tokens > 1:
        last = seq.output_token_ids.pop()
        reason = original(seq, eos_token_ids)
        seq.output_token_ids.append(last)
        return reason
    return original(seq, eos_token_ids)


@_bug(Sequence, "token_ids")
def chunk_over_the_end_of_the_prompt_repeats_a_token(
    original: Any, seq: Sequence, start: int, stop: int
) -> Any:
    tokens = original(seq, start, stop)
    boundary = len(seq.request.prompt_token_ids)
    if start < boundary < stop:
        return (*tokens[:-1], seq.request.prompt_token_ids[-1])
    return tokens


@_bug(StepPlan, "add_row")
def chunk_samples_before_its_last_token(original: Any, step: Any, seq: Sequence) -> None:
    original(step, seq)
    step.rows[seq] = dataclasses.replace(step.rows[seq], sample=True)


@_bug(StepPlan, "add_row")
def positions_start_at_the_prefix_length(original: Any, step: Any, seq: Sequence) -> None:
    original(step, seq)
    step.rows[seq] = dataclasses.replace(step.rows[seq], first_position=seq.num_virtual_tokens)


@_bug(Scheduler, "_grow")
def sequence_runs_without_growing(original: Any, scheduler: Any, seq: Sequence, step: Any) -> bool:
    return True


@_bug(Scheduler, "_grow")
def youngest_goes_on_at_the_cost_of_the_oldest(
    original: Any, scheduler: Any, seq: Sequence, step: Any
) -> bool:
    order = scheduler._order
    scheduler._order = {s: -n for s, n in order.items()}
    try:
        grown: bool = original(scheduler, seq, step)
    finally:
        scheduler._order = order
    scheduler._waiting.sort(key=order.__getitem__)
    return grown


@_bug(Scheduler, "_receive")
def choices_share_one_seed(original: Any, scheduler: Any, message: Any, *rest: Any) -> None:
    original(scheduler, message, *rest)
    for seq in scheduler._waiting:
        seq.seed -= seq.index if seq.first_scheduled is None and seq.index == 2 else 0


@_bug(Scheduler, "_receive")
def evict_order_also_forgets_a_load_under_way(
    original: Any, scheduler: Any, message: Any, *rest: Any
) -> None:
    original(scheduler, message, *rest)
    if isinstance(message, EvictPrefix):
        scheduler._loads.loading.discard(message.digest)


@_bug(Scheduler, "_receive")
def answer_that_nobody_asked_for_is_staged(
    original: Any, scheduler: Any, message: Any, *rest: Any
) -> None:
    original(scheduler, message, *rest)
    if isinstance(message, PrefixReady) and scheduler._waiting:
        scheduler._loads.loading.add(message.digest)


# ---- steps that overlap --------------------------------------------------------------------------


@_bug(Sequence, "settle")
def token_is_put_behind_those_that_came_meanwhile(
    original: Any, seq: Sequence, num_tokens: int, token_id: int
) -> Any:
    count = original(seq, num_tokens, token_id)
    if seq.is_pending:
        seq.output_token_ids[count - 1], seq.output_token_ids[-1] = PENDING, token_id
    return count


@_bug(Scheduler, "_commit_row")
def row_is_taken_for_the_one_under_way(
    original: Any, scheduler: Any, row: Any, outcome: RowOutcome
) -> Any:
    """What is entered into the prompt cache then reaches to tokens that nobody knows yet."""
    seq = row.sequence
    if row.sample and outcome.error is None and seq.status is SequenceStatus.RUNNING:
        num_full = seq.num_tokens // scheduler._blocks.block_size
        scheduler._prompt_cache.enter(seq.chain, seq.block_table, seq.token_ids, num_full)
    return original(scheduler, row, outcome)


@_bug(Scheduler, "_commit_row")
def blocks_that_were_given_back_are_entered_into_the_cache(
    original: Any, scheduler: Any, row: Any, outcome: RowOutcome
) -> Any:
    seq, size = row.sequence, scheduler._blocks.block_size
    if seq.status is SequenceStatus.PREEMPTED and outcome.error is None and row.sample:
        num_full = (row.start + len(row.token_ids)) // size
        if not {*row.block_ids[:num_full]} & scheduler._prompt_cache.block_ids():
            table = list(row.block_ids)
            scheduler._prompt_cache.enter(seq.chain, table, seq.token_ids, num_full)
            while seq.chain.blocks:
                scheduler._prompt_cache._release(seq.chain.blocks.pop())
    return original(scheduler, row, outcome)


@_bug(Sequence, "is_full")
def a_sequence_that_has_all_its_tokens_goes_on(original: Any, seq: Sequence) -> bool:
    return False


@_bug(Scheduler, "fail")
def those_who_began_with_a_prefix_of_a_failed_step_go_on(
    original: Any, scheduler: Any, plan: Any, error: str
) -> Any:
    outputs = scheduler.commit(plan, [RowOutcome(error=error)] * len(plan.rows))
    for load in plan.prefix_loads:
        scheduler._pins.lift_digest(load.ref.digest)
        scheduler._prefixes.retire(load.ref.digest)
    return outputs


@_bug(Scheduler, "_end_failed")
def blocks_of_a_failed_row_are_not_wiped(
    original: Any, scheduler: Any, seq: Sequence, error: str
) -> Any:
    output = original(scheduler, seq, error)
    scheduler._wipe_block_ids.clear()
    return output


@_bug(EngineCore, "has_work")
def the_engine_sleeps_while_a_step_is_under_way(original: Any, core: Any) -> Any:
    return core._scheduler.has_work() and core._under_way is None
