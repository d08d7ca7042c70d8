"""The traffic of one run: when each request is sent, for which task, how long its prompt and its answer are.

S-LoRA's recipe (arXiv 2311.03285): gaps between arrivals from a gamma distribution, which is Poisson's process at a
coefficient of variation of 1; lengths uniform; popularity of tasks a power law. Drawn before the run, so that nothing
that the server does can change it. Pure, on any thread; called by `session`.

Arrivals, lengths, tasks and prompts have random streams of their own: with the same seed, runs with different numbers of
tasks differ in nothing but the tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from loadtest.errors import BadLoad

MAX_REQUESTS: Final = 5_000_000  # 40 bytes each, here and again in what is recorded
_ARRIVALS, _TASKS, _INPUTS, _OUTPUTS, _PROMPTS = range(5)

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """What traffic is to be like. Lengths are in tokens, both ends included.

    `burstiness`: coefficient of variation of the gaps, 1 for Poisson. `zipf`: exponent of the popularity, 0 for uniform.
    `warmup_seconds`: arrivals before the window that counts, which has `duration_seconds`.
    """

    rate: float
    burstiness: float
    zipf: float
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    warmup_seconds: float
    duration_seconds: float
    seed: int

    @property
    def total_seconds(self) -> float:
        """In which requests are sent."""
        return self.warmup_seconds + self.duration_seconds


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order of their arrival; all arrays are `[num_requests]`.

    `at`: seconds after the start of the run. `task`: rank of the task, 0 for the most popular.
    """

    at: Floats
    task: Integers
    input_len: Integers
    output_len: Integers
    seed: int

    def __len__(self) -> int:
        return len(self.at)

    def prompt(self, index: int, vocab_size: int) -> list[int]:
        """The token ids of a request's prompt: random, and the same whenever they are asked for."""
        rng = np.random.default_rng([self.seed, _PROMPTS, index])
        ids: list[int] = rng.integers(0, vocab_size, int(self.input_len[index])).tolist()
        return ids


def popularity(num_tasks: int, exponent: float) -> Floats:
    """Share of the requests that each rank gets, `[num_tasks]`: rank r has a weight of 1 / r ** exponent."""
    weights = np.arange(1, num_tasks + 1, dtype=np.float64) ** -exponent
    shares: Floats = weights / weights.sum()
    return shares


def arrivals(rate: float, burstiness: float, seconds: float, rng: np.random.Generator) -> Floats:
    """Times of a renewal process with gamma gaps, from 0 up to `seconds`. Raises `BadLoad` for too many."""
    if rate * seconds > MAX_REQUESTS:
        raise BadLoad(
            f"{rate:g} requests/s for {seconds:g} s: expected at most {MAX_REQUESTS:,} requests"
        )
    shape = 1.0 / burstiness**2
    times = np.empty(0)
    last = 0.0
    while last < seconds:
        count = int((seconds - last) * rate * 1.1) + 64
        more = last + np.cumsum(rng.gamma(shape, 1.0 / (shape * rate), count))
        times = np.concatenate([times, more])
        last = float(times[-1])
    return times[times < seconds]


def make_traffic(shape: Shape, num_tasks: int) -> Traffic:
    """All requests of a run over `num_tasks` tasks; 0 is the bare base model. Raises `BadLoad`."""
    at = arrivals(shape.rate, shape.burstiness, shape.total_seconds, _rng(shape, _ARRIVALS))
    if not len(at):
        raise BadLoad(
            f"no request arrives in {shape.total_seconds:g} s at {shape.rate:g} requests/s"
        )
    shares = popularity(max(num_tasks, 1), shape.zipf)
    # From one uniform number each, so that a request's place in the ranking hardly moves with the number of tasks.
    task = np.searchsorted(np.cumsum(shares), _rng(shape, _TASKS).random(len(at)), side="right")
    return Traffic(
        at=at,
        task=np.minimum(task, len(shares) - 1).astype(np.int64),
        input_len=_uniform(shape.input_len, len(at), _rng(shape, _INPUTS)),
        output_len=_uniform(shape.output_len, len(at), _rng(shape, _OUTPUTS)),
        seed=shape.seed,
    )


def _uniform(bounds: tuple[int, int], count: int, rng: np.random.Generator) -> Integers:
    return rng.integers(bounds[0], bounds[1], count, endpoint=True)


def _rng(shape: Shape, stream: int) -> np.random.Generator:
    return np.random.default_rng([shape.seed, stream])
