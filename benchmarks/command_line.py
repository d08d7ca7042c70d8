"""What the scripts that hold a contest have in common: their flags, their rules, how they end.

`peft_comparison.py`, `many_tasks.py`, `server_overhead.py` and `vllm_comparison.py` begin with `contest_parser`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.contest import MAX_TRIES, Rules
from benchmarks.hardware_limits import LimitsMeter
from benchmarks.workload import SCALES, Scale, Workload

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def contest_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The flags of every contest; `name` is the script's module in this package."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--scale", choices=SCALES, default="0.5b", help="model shape and workload")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
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
    parser.add_argument("--out", type=Path, help="write the report there as markdown")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with `command`: what was typed. Sets torch's threads; exits if a report would be overwritten."""
    arguments = parser.parse_args(argv)
    if arguments.out is not None and arguments.out.exists():
        parser.error(f"--out {arguments.out} exists, and a report is a record: choose a new name")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    given = sys.argv[1:] if argv is None else argv
    arguments.command = f"{parser.prog} {shlex.join(given)}".strip()
    return arguments


def rules(arguments: argparse.Namespace, workload: Workload) -> Rules:
    """As the flags say; an eighth of an output is enough to warm up."""
    return Rules(
        repeats=arguments.repeats,
        round_seconds=arguments.round_seconds,
        quiet_cores=arguments.quiet,
        output_len=workload.output_len,
        warm_up_len=max(2, workload.output_len // 8),
    )


def limits_meter(scale: Scale, dtype: torch.dtype) -> LimitsMeter:
    """For the machine's limits; a quick one where nothing is measured in earnest."""
    if scale.name == SCALES["tiny"].name:
        return LimitsMeter(dtype, buffer_bytes=2**22, matrix_size=128, tries=2)
    return LimitsMeter(dtype)


def publish(out: Path | None, markdown: str, text: str, figures: Mapping[str, Any]) -> None:
    """Writes the report if a path is given; prints text, then the figures as the last line, in JSON."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(markdown)
    print(text)
    print()
    print(json.dumps(figures, allow_nan=False))


class Progress:
    """One line on stderr per event, with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._started:6.1f} s] {text}", file=sys.stderr, flush=True)
