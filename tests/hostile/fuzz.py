"""The mutation fuzzer of the upload validator: `python -m tests.hostile.fuzz --mutants 1000000 --seed 1`.

Mutants are judged in processes of their own, so one that kills its process is a fault with a number like any
other. Each has 16 MiB of memory and 50 ms of CPU time:

* memory: the address space may grow by 16 MiB over what the process has when the mutant begins (RLIMIT_AS), which
  counts what Python, torch and the libraries take alike and costs two system calls; what needs more gets a
  MemoryError, and that is no named refusal. Within the heap that is there already, tracemalloc measures one
  mutant in 500;
* time: of the thread, so that a busy machine fails nothing.

A fault is written to `--out` as a file that `--replay` judges again. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import torch

from prefix_store.backends.memory import MemoryBackend
from tests.hostile.judge import Judgement, judged, timed
from tests.hostile.mutation import Mutant, mutant
from tests.hostile.originals import Original, originals

MAX_BYTES: Final = 16 * 2**20
TRACED_EVERY: Final = 500
NO_MUTANT: Final = -1  # the number of a valid file
_REPORT_EVERY: Final = 1000
_TICK_SECONDS: Final = 1e-5


@dataclass(slots=True)
class Tally:
    """What was seen so far. `ticks`: how many mutants took so many ten microseconds. `rss_kib`: at its highest."""

    mutants: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    ticks: Counter[int] = field(default_factory=Counter)
    peak_bytes: int = 0
    rss_kib: int = 0
    faults: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Count in what another has seen."""
        self.mutants += other.mutants
        self.outcomes += other.outcomes
        self.ticks += other.ticks
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.rss_kib = max(self.rss_kib, other.rss_kib)
        self.faults |= other.faults

    def count(self, number: int, judgement: Judgement, peak_bytes: int) -> None:
        """Count in one mutant."""
        faults = judgement.faults
        if peak_bytes > MAX_BYTES:
            faults += (f"took {peak_bytes} bytes",)
        if faults:
            self.faults[number] = faults
        self.mutants += 1
        self.outcomes[judgement.outcome] += 1
        self.ticks[int(judgement.seconds / _TICK_SECONDS)] += 1
        self.peak_bytes = max(self.peak_bytes, peak_bytes)

    def cpu_ms(self, share: float) -> float:
        """The CPU time that `share` of the mutants stayed within."""
        seen, wanted = 0, share * self.mutants
        for tick in sorted(self.ticks):
            seen += self.ticks[tick]
            if seen >= wanted:
                return round((tick + 1) * _TICK_SECONDS * 1e3, 2)
        return 0.0


def tallies(
    numbers: range, seed: int, files: Sequence[Original], at: Any = None, *, bounded: bool = False
) -> Iterator[Tally]:
    """Judges these mutants in this process, and tells of every thousand, and of a fault at once.

    `at` is told each number before. `bounded`: with the limit on memory.
    """
    tally = Tally()
    for number in numbers:
        if at is not None:
            at.value = number
        tally.count(number, *_judged(mutant(number, seed, files), bounded=bounded))
        if tally.faults or tally.mutants == _REPORT_EVERY:
            yield tally
            tally = Tally()
    yield tally


def _judged(one: Mutant, *, bounded: bool) -> tuple[Judgement, int]:
    """And the traced peak of memory in bytes, or 0 for most."""
    with address_space_limit(MAX_BYTES) if bounded else contextlib.nullcontext():
        judgement = judged(one)
    return judgement, 0 if one.number % TRACED_EVERY else traced_peak(one)


@contextlib.contextmanager
def address_space_limit(more_bytes: int) -> Iterator[None]:
    """The process can not grow by more than this. For a process that does nothing else meanwhile."""
    num_pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def traced_peak(one: Mutant) -> int:
    """Bytes that Python had allocated at once for a mutant, at most."""
    tracemalloc.start()
    try:
        timed(one, MemoryBackend())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- processes -----------------------------------------------------------------------------------


def work(numbers: range, seed: int, sending: Connection, at: Any) -> None:
    """The whole life of one process: `at` holds the number that it is about to judge."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no mutant's garbage
    files = originals()
    for original in files:  # first calls load and compile
        judged(Mutant(NO_MUTANT, original, original.data))
    for tally in tallies(numbers, seed, files, at, bounded=True):
        tally.rss_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sending.send(tally)
    sending.close()


def run(numbers: range, seed: int, num_jobs: int) -> Iterator[Tally]:
    """Tallies of parts of `numbers`, as they come from `num_jobs` processes."""
    context = multiprocessing.get_context("spawn")
    open_ends: dict[Connection, tuple[BaseProcess, Any]] = {}
    for job in range(num_jobs):
        receiving, sending = context.Pipe(duplex=False)
        at = context.Value("q", NO_MUTANT, lock=False)
        process: BaseProcess = context.Process(
            target=work, args=(numbers[job::num_jobs], seed, sending, at)
        )
        process.start()
        sending.close()
        open_ends[receiving] = (process, at)
    while open_ends:
        for end in wait([*open_ends]):
            assert isinstance(end, Connection)
            try:
                yield end.recv()
            except EOFError:
                process, at = open_ends.pop(end)
                process.join()
                if process.exitcode:
                    yield Tally(faults={at.value: (f"ended its process: {process.exitcode}",)})


# ---- command line --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if there were faults."""
    args = _arguments(arguments)
    if args.replay:
        return replay(args.replay)
    started = time.monotonic()
    total, shown = Tally(), 0.0
    numbers = range(args.first, args.first + args.mutants)
    first_rss = 0
    for tally in run(numbers, args.seed, args.jobs):
        total.add(tally)
        first_rss = first_rss or tally.rss_kib
        for number, faults in tally.faults.items():
            report(number, args.seed, faults, args.out)
        seconds = time.monotonic() - started
        if seconds - shown > 10:
            shown = seconds
            print(
                f"{total.mutants:,} of {args.mutants:,} mutants, {seconds:.0f} s", file=sys.stderr
            )
    seconds = time.monotonic() - started
    print(json.dumps(summary(total, args.seed, seconds, total.rss_kib - first_rss)))
    return 1 if total.faults or total.mutants != args.mutants else 0


def summary(total: Tally, seed: int, seconds: float, rss_growth_kib: int) -> dict[str, Any]:
    """The closing line."""
    return {
        "mutants": total.mutants,
        "seed": seed,
        "outcomes": dict(total.outcomes.most_common()),
        "cpu_ms": {"p50": total.cpu_ms(0.5), "p99.9": total.cpu_ms(0.999), "max": total.cpu_ms(1)},
        "traced_peak_kib": total.peak_bytes // 1024,
        "rss_growth_kib": rss_growth_kib,
        "seconds": round(seconds, 1),
        "faults": {str(number): list(faults) for number, faults in total.faults.items()},
    }


def report(number: int, seed: int, faults: tuple[str, ...], directory: Path) -> None:
    """Says what is wrong with a mutant, and keeps it."""
    if number == NO_MUTANT:
        print(f"the valid files: {'; '.join(faults)}", file=sys.stderr)
        return
    one = mutant(number, seed, originals())
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{one.original.name}.{seed}.{number}.safetensors"
    path.write_bytes(one.data)
    print(
        f"mutant {number} of seed {seed}: {'; '.join(faults)}\n  --replay {path}", file=sys.stderr
    )


def replay(path: Path) -> int:
    """Judges a file that `report` kept, or one that a person named like it."""
    files = originals()
    [original] = [file for file in files if file.name == path.name.partition(".")[0]]
    judgement = judged(Mutant(0, original, path.read_bytes()))
    print(json.dumps(asdict(judgement)))
    return 1 if judgement.faults else 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz the upload validator.")
    parser.add_argument("--mutants", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--out", type=Path, default=Path("build/fuzz"), help="where faults are kept"
    )
    parser.add_argument("--replay", type=Path, help="judge one kept file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
