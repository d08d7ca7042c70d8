"""prefixd against PEFT: many tasks, one base model, all requests at once. Run it with `make bench`.

**What is measured.** 8 tasks with 4 requests each arrive together; every task has a prefix of its own. The
same random-weight model, the same K/V tensors, the same prompts, greedy, in one process:

* `prefixd`: the engine behind the server, all requests in one batch that mixes the tasks. Each round begins
  with the prefixes on disk only: they are read, verified, loaded and shared while the clock runs;
* `peft_single`: PEFT's `generate` as its documentation shows it, one request after another;
* `peft_batched`: the most that PEFT can put together, the 4 requests of a task in one `generate` call.

Output tokens per second count all tokens of all requests over the time until the last one is done. TTFT
(time to first token) counts from the common arrival, so whoever serves one after another lets the others
wait; "alone" is that of a single request with nobody else there.

**Why batching wins.** A decode step must read every weight once from memory, 1 GB here, whether it computes
one row or thirty-two. With one row, the arithmetic is done long before the next weights have come: the step
is bound by memory, and further rows are nearly free until multiplying takes as long as reading (the
crossover is where 2 * parameters * rows / FLOPs exceeds bytes / bandwidth, about 15 rows on the machine of
the first report). PEFT cannot fill a step, since one adapter is active at a time. prefixd can: a prefix is
just K/V that a row attends over, so rows of different tasks share the step and its weights.

**How to read the table.** `ms/step` is the median step that decodes one token for `rows` requests. `limit`
is the least that such a step could take on this machine, from bandwidth and matrix speed measured in the
same run (`hardware_limits.py`); `of limit` is the share of it that was reached, which says how much is left
to gain without better hardware. `measured` below 100 % means that a full pass would have taken too long: the
calls of a round are repeated on paper to make a whole pass. `prefixd is` above 1 means prefixd is faster.
The notes below the table say how many cores other processes used meanwhile: a quiet machine shows 0.0.

In float32 everybody gives the same tokens (the test of this script holds them to it). In bfloat16 sums are
rounded in another order and random weights leave many near ties, so greedy texts part early, also those of
PEFT with itself at two batch sizes; the notes show all three pairs.

**What is unfair, and to whom.**

* to PEFT: everything arrives at once, which suits a batching server best; with one lonely request the two
  are about equal. PEFT runs uncompiled with the attention that transformers takes by default
  (`--peft-attention eager` tries the other one);
* to prefixd: it reads prefixes from disk in every round while PEFT has its adapters in memory; it checks,
  streams and detokenizes every token of every request, which `generate` does not; all prompts have one
  length, so PEFT's batches hold no padding;
* to neither: there is no HTTP on either side, and random weights take the same time as trained ones.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.contest import MAX_TRIES, Contestant, Result, Rules, compete
from benchmarks.hardware_limits import LimitsMeter, ModelCost
from benchmarks.peft_contestants import PeftGenerate, load_peft_model
from benchmarks.prefixd_contestant import Prefixd
from benchmarks.report import Machine, Report
from benchmarks.workload import SCALES, Scale, TaskPrefix, make_prefixes, write_model

_PACKAGES: Final = ("torch", "transformers", "peft")
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peft_comparison",
        description="prefixd against PEFT: output tokens/s and TTFT, and the share of the machine's limit",
    )
    parser.add_argument("--scale", choices=SCALES, default="0.5b", help="model shape and workload")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of every contestant")
    parser.add_argument(
        "--round-seconds",
        type=float,
        default=35.0,
        help="begin no further call after this long; the pass is extrapolated. 0: always a full pass",
    )
    parser.add_argument(
        "--quiet",
        type=float,
        default=math.inf,
        metavar="CORES",
        help="try a round again during which other processes used more cores than this (at most "
        f"{MAX_TRIES} times as many rounds); the quietest count",
    )
    parser.add_argument(
        "--threads", type=int, help="torch threads of everybody; torch's choice if left out"
    )
    parser.add_argument("--peft-attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--out", type=Path, help="write the report there as markdown")
    arguments = parser.parse_args(argv)
    if arguments.out is not None and arguments.out.exists():
        parser.error(f"--out {arguments.out} exists, and a report is a record: choose a new name")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints it; the last line is JSON."""
    arguments = parse_arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    given = sys.argv[1:] if argv is None else argv
    report = run(arguments, shlex.join(["python", "-m", "benchmarks.peft_comparison", *given]))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(report.markdown())
    print(report.text())
    print()
    print(json.dumps(report.figures(), allow_nan=False))


def run(arguments: argparse.Namespace, command: str) -> Report:
    """Sets everything up, lets the contestants compete, measures the machine between their turns."""
    transformers_logging.disable_progress_bar()
    scale, dtype = SCALES[arguments.scale], _DTYPES[arguments.dtype]
    progress = _Progress()
    machine = Machine.describe(_PACKAGES)
    meter = _limits_meter(scale, dtype)
    prefixes = make_prefixes(scale, dtype)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="prefixd-bench-")))
        write_model(directory / "model", scale, dtype)
        progress("model written")
        contestants, cost = _set_up(directory, scale, prefixes, arguments, stack)
        progress("contestants set up")
        results = _compete(contestants, scale, arguments, progress, meter)
    return Report(
        title="prefixd against PEFT on a CPU",
        benchmark="peft_comparison",
        command=command,
        model=f"{scale.name}, {arguments.dtype}",
        machine=machine,
        workload=scale.workload,
        cost=cost,
        limits=meter.limits(),
        results=results,
    )


def _set_up(
    directory: Path,
    scale: Scale,
    prefixes: Sequence[TaskPrefix],
    arguments: argparse.Namespace,
    stack: ExitStack,
) -> tuple[list[Contestant], ModelCost]:
    """The contestants, ours first, and what a step costs; `stack` closes them."""
    prefixd = Prefixd(
        directory / "model", directory / "store", prefixes, kv_cache_bytes=scale.kv_cache_bytes
    )
    stack.callback(prefixd.close)
    model = load_peft_model(directory / "model", prefixes, attention=arguments.peft_attention)
    group = scale.workload.requests_per_task
    attention = f"attention {arguments.peft_attention}"
    peers = [
        PeftGenerate(model, "peft_single", f"one request after another, {attention}", 1),
        PeftGenerate(
            model, "peft_batched", f"the {group} requests of a task together, {attention}", group
        ),
    ]
    first = prefixes[0]
    kv_bytes = sum(t[0].nbytes for t in (*first.keys, *first.values))
    return [prefixd, *peers], ModelCost.of(model.get_base_model(), kv_bytes)


def _compete(
    contestants: Sequence[Contestant],
    scale: Scale,
    arguments: argparse.Namespace,
    progress: _Progress,
    meter: LimitsMeter,
) -> list[Result]:
    output_len = scale.workload.output_len
    rules = Rules(
        repeats=arguments.repeats,
        round_seconds=arguments.round_seconds,
        quiet_cores=arguments.quiet,
        output_len=output_len,
        warm_up_len=max(2, output_len // 8),
    )
    requests = scale.workload.requests(scale.config["vocab_size"])
    return compete(contestants, requests, rules, progress, meter.measure)


def _limits_meter(scale: Scale, dtype: torch.dtype) -> LimitsMeter:
    if scale is SCALES["tiny"]:
        return LimitsMeter(dtype, buffer_bytes=2**22, matrix_size=128, tries=2)
    return LimitsMeter(dtype)


class _Progress:
    """One line on stderr per event, with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._started:6.1f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
