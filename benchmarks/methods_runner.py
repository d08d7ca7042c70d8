"""Runs jobs side by side, each in a new process of one thread, and says how long it will take. Parent: main thread.

Two processes of one thread do more on two cores than one process of two, for a model this small. A process is forked from
a server that has imported everything and holds nothing else, so what it adds to its memory is the run's.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.methods_plan import Job, distinct, expected_seconds
from benchmarks.methods_training import Workplace, perform


class Progress:
    """Lines on stderr with the time left: what is expected of the rest, by how right that was so far."""

    def __init__(self, jobs: Sequence[Job], num_processes: int) -> None:
        self._left = {job.key: expected_seconds(job) for job in jobs}
        self._total = sum(self._left.values())
        self._count = len(jobs)
        self._processes = max(num_processes, 1)
        self._started = time.perf_counter()

    def minutes_left(self) -> float:
        """By the plan until something is done, then by the pace."""
        left = sum(self._left.values())
        done = self._total - left
        elapsed = time.perf_counter() - self._started
        pace = elapsed / done if done else 1.0 / self._processes
        return left * pace / 60.0

    def done(self, key: str) -> None:
        del self._left[key]
        number = self._count - len(self._left)
        said = f"{number} of {self._count}, {self.minutes_left():.1f} min left: {key}"
        print(said, file=sys.stderr, flush=True)


def unfinished(jobs: Sequence[Job], place: Workplace) -> list[Job]:
    """Each run once, without those whose results are kept."""
    return [job for job in distinct(jobs) if not place.is_done(job)]


def run_jobs(jobs: Sequence[Job], place: Workplace, num_processes: int) -> None:
    """Those that are not done yet. `num_processes` 0: one after another in this process."""
    waiting = unfinished(jobs, place)
    progress = Progress(waiting, num_processes)
    for key in _performed(waiting, place, num_processes):
        progress.done(key)


def _performed(jobs: Sequence[Job], place: Workplace, num_processes: int) -> Iterator[str]:
    if num_processes == 0:
        before = torch.get_num_threads()
        try:
            for job in jobs:
                yield perform(job, place)
        finally:
            torch.set_num_threads(before)
    elif jobs:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([perform.__module__])
        with context.Pool(min(num_processes, len(jobs)), maxtasksperchild=1) as pool:
            yield from pool.imap_unordered(partial(perform, place=place), jobs, chunksize=1)
