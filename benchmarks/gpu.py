"""A CUDA machine in nine minutes: what it can do, and what share of that the kernels and the engine reach.

**What is measured**, stage by stage, each in a process of its own with a time limit of its own, so that one
that fails or hangs takes nothing from the others (and what it had measured before, counts):

* `ceilings`: copying, reading and multiplying as fast as torch can on this machine;
* `correctness`: the decode kernels in bfloat16 against attention in float64, and whether a row has the same
  bits alone, in a batch, grouped and not. Triton's interpreter can show neither for bfloat16;
* `kernels`: both decode kernels on one layer of each model shape, as served and with other tiles;
* `grouped`: the kernels with a shared prefix read once per group of its rows, against once per row;
* `steps`: the engine's decode step (tensors, model, sampling) for 1 to 256 rows, launch by launch and as a CUDA graph, and
  grouped against ungrouped;
* `nano`: nano-vllm's benchmark, 256 requests of 100 to 1,024 tokens in and out, through the engine. Ours is
  greedy, theirs samples;
* `tasks`: 64 tasks against 1 in a batch of 64, and what a cold prefix in pinned memory adds to a first token;
* `peer`: transformers' continuous batching on the same weights and prompts.

**Why decoding is bound by memory.** A step multiplies every weight with one token of each row. Up to some
hundred rows the GPU is done with that before the weights have come from memory, so the least time is the bytes
over the bandwidth: the weights once, and the keys and values of every row. Only the latter can be shared: 256
rows of 8 tasks with a prefix of 2,048 tokens read 524,288 prefix tokens one by one, and 16,384 in groups.

**How to read the table.** `of limit` is the least time (bytes over the read bandwidth of `ceilings`) over the
time taken. `target` is the project's aim on an H200, `met` compares; on another GPU it says little.

Kernels are timed inside a captured CUDA graph, which also shows that they can be replayed, over memory that
the cache does not hold. Steps are timed by the clock, with everything that Python does.

**What is unfair.** Weights are random, which changes no time. Memory that a prefix of one hot task takes fits
the L2 cache, so reading it once per row costs less than its bytes say. The peer runs as its documentation
shows it, without tuning.

Run `python -m benchmarks.gpu --out report.md`; `--stage steps` runs some stages only; `--device cpu --tiny` runs
whatever can run without a GPU (kernels in Triton's interpreter), to see that it works.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.gpu_report import GpuReport, StageResult
from benchmarks.gpu_shapes import (
    CPU_SIZES,
    GPU_SIZES,
    LLAMA_8B,
    QWEN3_06B,
    QWEN25_15B,
    Figure,
    ModelShape,
    Sizes,
    tiny,
)
from benchmarks.report import Machine

_MARK: Final = "FIGURE "
_SHAPES: Final = (LLAMA_8B, QWEN3_06B, QWEN25_15B)
_REPOSITORY: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a stage runs, and how much of it."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    shapes: tuple[ModelShape, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """`run` yields figures as they are measured; it imports what it needs, so that a missing package fails it alone."""

    run: Callable[[Scene], Iterator[Figure]]
    limit_seconds: float


def _ceilings(scene: Scene) -> Iterator[Figure]:
    from benchmarks.gpu_kernels import ceilings

    return ceilings(scene.sizes, scene.device)


def _correctness(scene: Scene) -> Iterator[Figure]:
    from benchmarks.gpu_kernels import correctness

    return correctness(list(scene.shapes), scene.device, scene.dtype)


def _kernels(scene: Scene) -> Iterator[Figure]:
    from benchmarks.gpu_kernels import kernel_sweep

    return kernel_sweep(list(scene.shapes), scene.sizes, scene.device, scene.dtype)


def _grouped(scene: Scene) -> Iterator[Figure]:
    from benchmarks.gpu_kernels import grouped_kernels

    return grouped_kernels(list(scene.shapes[:2]), scene.sizes, scene.device, scene.dtype)


def _steps_of(index: int) -> Callable[[Scene], Iterator[Figure]]:
    def run(scene: Scene) -> Iterator[Figure]:
        from benchmarks.gpu_engine import decode_steps

        return decode_steps(scene.shapes[index], scene.sizes, scene.device, scene.dtype)

    return run


def _nano(scene: Scene) -> Iterator[Figure]:
    from benchmarks.gpu_engine import nano

    return nano(scene.shapes[1], scene.sizes, scene.device, scene.dtype)


def _tasks(scene: Scene) -> Iterator[Figure]:
    from benchmarks.gpu_engine import tasks_and_cold

    return tasks_and_cold(scene.shapes[0], scene.sizes, scene.device, scene.dtype)


def _peer(scene: Scene) -> Iterator[Figure]:
    from benchmarks.gpu_engine import peer

    return peer(scene.shapes[0], scene.sizes, scene.device, scene.dtype)


# The most useful first: when time runs out, the last ones are left out.
STAGES: Final[dict[str, Stage]] = {
    "ceilings": Stage(_ceilings, 40),
    "correctness": Stage(_correctness, 70),
    "kernels": Stage(_kernels, 100),
    "grouped": Stage(_grouped, 60),
    "steps-8b": Stage(_steps_of(0), 80),
    "steps-0.6b": Stage(_steps_of(1), 60),
    "nano": Stage(_nano, 120),
    "tasks": Stage(_tasks, 60),
    "steps-1.5b": Stage(_steps_of(2), 50),
    "peer": Stage(_peer, 100),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="a CUDA machine's ceilings, and the share of them that prefixd reaches",
    )
    parser.add_argument(
        "--stage", action="append", choices=STAGES, help="only this; may be repeated"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny models and workloads: no figures")
    parser.add_argument("--seconds", type=float, default=530.0, help="of all stages together")
    parser.add_argument("--out", type=Path, help="write the report there as markdown")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.out is not None and arguments.out.exists():
        parser.error(f"--out {arguments.out} exists, and a report is a record: choose a new name")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stages and prints what they gave; the last line is JSON."""
    arguments = parse_arguments(argv)
    if arguments.inside:
        run_inside(arguments)
        return
    given = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    results = []
    for name in arguments.stage or STAGES:
        left = arguments.seconds - (time.monotonic() - started)
        results.append(run_stage(name, arguments, min(STAGES[name].limit_seconds, left)))
        print(f"[{time.monotonic() - started:5.0f} s] {results[-1].summary()}", file=sys.stderr)
    report = GpuReport(
        command=shlex.join(["python", "-m", "benchmarks.gpu", *given]),
        machine=Machine.describe(("torch", "transformers")),
        gpu=_gpu_name(arguments.device),
        results=tuple(results),
    )
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(report.markdown())
    print(report.text())
    print()
    print(json.dumps(report.figures(), allow_nan=False))


def _gpu_name(device: str) -> str:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "none"


def run_stage(name: str, arguments: argparse.Namespace, limit_seconds: float) -> StageResult:
    """One stage in a process of its own. What it measured before it failed or was stopped, is kept."""
    if limit_seconds < 5:
        return StageResult(name, (), 0.0, "no time was left for it")
    interpret = ["env", "TRITON_INTERPRET=1"] if arguments.device == "cpu" else []
    command = [*interpret, sys.executable, "-m", "benchmarks.gpu", "--inside", "--stage", name]
    command += ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with subprocess.Popen(command, cwd=_REPOSITORY, stdout=out, stderr=err) as process:
            try:
                code: int | None = process.wait(limit_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
        out.seek(0)
        err.seek(0)
        figures = read_figures(out.read())
        last_words = err.read().strip().splitlines()[-1:] or ["nothing on stderr"]
    error = None
    if code is None:
        error = f"stopped after {limit_seconds:.0f} s"
    elif code:
        error = f"exit {code}: {last_words[0][:300]}"
    return StageResult(name, figures, time.monotonic() - started, error)


def read_figures(printed: str) -> tuple[Figure, ...]:
    """The figures among the lines that a stage printed; a line that was cut off is none."""
    return tuple(
        Figure(**json.loads(line.removeprefix(_MARK)))
        for line in printed.splitlines(keepends=True)
        if line.startswith(_MARK) and line.endswith("\n")
    )


def run_inside(arguments: argparse.Namespace) -> None:
    """The stage itself, in the child: prints each figure as soon as it is there."""
    on_gpu = arguments.device == "cuda"
    shapes = tuple(tiny(s) for s in _SHAPES) if arguments.tiny else _SHAPES
    scene = Scene(
        device=torch.device(arguments.device),
        # The interpreter multiplies bfloat16 wrongly.
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        sizes=CPU_SIZES if arguments.tiny else GPU_SIZES,
        shapes=shapes,
    )
    # Not in inference mode: tensors that are made in it can not be written by a peer's own thread.
    for name in arguments.stage:
        for figure in STAGES[name].run(scene):
            print(_MARK + json.dumps(figure.as_dict()), flush=True)


if __name__ == "__main__":
    main()
