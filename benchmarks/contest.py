"""How contestants are compared: what one must be able to do, in which order they run, what is counted.

A contestant splits the traffic into *calls* that it runs one after another: a server takes all requests in
one call, a plain `generate` needs one call per request. All requests arrive at t=0; who is not in the first
call waits for those before. Contestants take turns, so that a machine that slows down slows all of them.

Where a full pass would take minutes, a round runs calls until its time is up, the next round goes on where
this one stopped, and the pass is extrapolated by repeating the calls measured. Reports say so.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median
from typing import Final, Protocol

from benchmarks.machine_load import OthersMeter
from benchmarks.workload import Request

MAX_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Call:
    """What one call gave. Seconds count from its beginning; tuples are in the order of `requests`.

    `decode_step_seconds`: the steps that produced one token for every request of the call and did nothing
    else.
    """

    requests: tuple[Request, ...]
    tokens: tuple[tuple[int, ...], ...]
    first_token_seconds: tuple[float, ...]
    seconds: float
    decode_step_seconds: tuple[float, ...]


class Contestant(Protocol):
    """One way to serve the requests."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """The requests as it serves them: together within a call, one call after another."""

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        """Runs one call."""

    def close(self) -> None:
        """Frees what it holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """The calls that a contestant ran in its turn, and how many a full pass has.

    `lone_first_token_seconds`: TTFT of a single request with nobody else there. `load_average` was read before
    the round; `other_cores` is what other processes used up during it.
    """

    calls: tuple[Call, ...]
    calls_per_pass: int
    lone_first_token_seconds: float
    load_average: float
    other_cores: float

    @property
    def is_full_pass(self) -> bool:
        return len(self.calls) == self.calls_per_pass

    def whole_pass(self) -> Iterable[Call]:
        """As many calls as a pass has: those measured, repeated as often as needed."""
        return islice(cycle(self.calls), self.calls_per_pass)

    @property
    def pass_seconds(self) -> float:
        return sum(call.seconds for call in self.whole_pass())

    @property
    def tokens_per_second(self) -> float:
        tokens = sum(len(t) for call in self.whole_pass() for t in call.tokens)
        return tokens / self.pass_seconds

    def ttft_seconds(self) -> list[float]:
        """From the common arrival to each request's first token: earlier calls are waited for."""
        started, times = 0.0, []
        for call in self.whole_pass():
            times += [started + first for first in call.first_token_seconds]
            started += call.seconds
        return times


@dataclass(slots=True)
class Result:
    """The rounds of one contestant that count, of `num_tried`. Figures are medians over them."""

    name: str
    description: str
    rounds: list[Round] = field(default_factory=list)
    num_tried: int = 0

    def add(self, done: Round) -> None:
        self.rounds.append(done)
        self.num_tried += 1

    def has_enough(self, rules: Rules) -> bool:
        """Enough quiet rounds, or too many tries to hope for more."""
        quiet = sum(r.other_cores <= rules.quiet_cores for r in self.rounds)
        return quiet >= rules.repeats or self.num_tried >= MAX_TRIES * rules.repeats

    def keep_quietest(self, number: int) -> None:
        """Chooses by what others did to the machine, never by the outcome."""
        kept = sorted(self.rounds, key=lambda r: r.other_cores)[:number]
        self.rounds = [r for r in self.rounds if r in kept]

    @property
    def tokens_per_second(self) -> float:
        return median(r.tokens_per_second for r in self.rounds)

    @property
    def pass_seconds(self) -> float:
        return median(r.pass_seconds for r in self.rounds)

    @property
    def ttft_median(self) -> float:
        return median(percentile(r.ttft_seconds(), 0.5) for r in self.rounds)

    @property
    def ttft_p95(self) -> float:
        return median(percentile(r.ttft_seconds(), 0.95) for r in self.rounds)

    @property
    def ttft_alone(self) -> float:
        """Of a request with nobody else there."""
        return median(r.lone_first_token_seconds for r in self.rounds)

    @property
    def decode_step_seconds(self) -> float:
        """Median step that decodes a full call; NaN when no step did only that."""
        steps = [t for r in self.rounds for call in r.calls for t in call.decode_step_seconds]
        return median(steps) if steps else math.nan

    @property
    def rows_per_step(self) -> int:
        return len(self.rounds[0].calls[0].requests)

    @property
    def tasks_per_step(self) -> int:
        return len({request.task for request in self.rounds[0].calls[0].requests})

    @property
    def share_measured(self) -> float:
        """Part of the pass that was run, the rest being extrapolated."""
        return min(len(r.calls) / r.calls_per_pass for r in self.rounds)

    def tokens(self) -> dict[int, tuple[int, ...]]:
        """Each request's tokens, from the last call that had it."""
        return {
            request.index: tokens
            for r in self.rounds
            for call in r.calls
            for request, tokens in zip(call.requests, call.tokens, strict=True)
        }


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Rules:
    """`round_seconds`: a turn ends with the first call that ends after it; 0 runs every pass in full.

    `quiet_cores`: a round during which others used more is tried again, up to `MAX_TRIES` times as many.
    """

    repeats: int
    round_seconds: float
    quiet_cores: float
    output_len: int
    warm_up_len: int


def compete(
    contestants: Sequence[Contestant],
    requests: Sequence[Request],
    rules: Rules,
    progress: Callable[[str], None],
    after_round: Callable[[], None],
) -> list[Result]:
    """Warms everyone up, then A B C, A B C, ...; one result per contestant, in their order.

    `after_round` is called between two turns, outside of what is timed.
    """
    plans = [contestant.calls(requests) for contestant in contestants]
    results = [Result(c.name, c.description) for c in contestants]
    for contestant, plan in zip(contestants, plans, strict=True):
        call = contestant.serve(plan[0], rules.warm_up_len)
        progress(f"warm-up {contestant.name}: {call.seconds:.1f} s")
    position = [0] * len(contestants)
    while waiting := [i for i, result in enumerate(results) if not result.has_enough(rules)]:
        for i in waiting:
            done = run_round(contestants[i], plans[i], position[i], rules)
            position[i] += len(done.calls)
            results[i].add(done)
            after_round()
            progress(_describe(results[i], done))
    for result in results:
        result.keep_quietest(rules.repeats)
    return results


def _describe(result: Result, done: Round) -> str:
    return (
        f"round {result.num_tried} of {result.name}: {done.tokens_per_second:.1f} tokens/s, "
        f"{len(done.calls)} of {done.calls_per_pass} calls, load {done.load_average:.2f} before, "
        f"others used {done.other_cores:.2f} cores"
    )


def run_round(
    contestant: Contestant, plan: Sequence[tuple[Request, ...]], position: int, rules: Rules
) -> Round:
    """One turn, beginning with call `position` of the plan (which repeats)."""
    load_average, others = os.getloadavg()[0], OthersMeter()
    lone = contestant.serve(plan[position % len(plan)][:1], output_len=2)
    started = time.perf_counter()
    calls: list[Call] = []
    while len(calls) < len(plan):
        if calls and 0 < rules.round_seconds < time.perf_counter() - started:
            break
        requests = plan[(position + len(calls)) % len(plan)]
        calls.append(contestant.serve(requests, rules.output_len))
    return Round(tuple(calls), len(plan), lone.first_token_seconds[0], load_average, others.cores())


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two contestants' tokens are, over the requests that both served.

    After a first difference (a tie that rounding broke the other way) two texts go their own ways, so
    `prefix_share` counts the tokens before it. `num_distinct`: outputs that differ from each other; few of
    them would make equality mean little.
    """

    num_requests: int
    num_distinct: int
    identical_share: float
    prefix_share: float


def agreement(
    ours: Mapping[int, tuple[int, ...]], theirs: Mapping[int, tuple[int, ...]]
) -> Agreement:
    """Compares by request."""
    common = sorted(ours.keys() & theirs.keys())
    same = sum(ours[i] == theirs[i] for i in common)
    alike = sum(_common_length(ours[i], theirs[i]) for i in common)
    return Agreement(
        num_requests=len(common),
        num_distinct=len({ours[i] for i in common}),
        identical_share=same / len(common),
        prefix_share=alike / sum(len(ours[i]) for i in common),
    )


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
