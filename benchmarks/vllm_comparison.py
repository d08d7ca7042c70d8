"""prefixd against vLLM on the CPU, each in an environment and a process of its own. `make bench-vllm` runs it.

**What is measured.** The same random-weight model, read from the same folder by both; greedy, fixed output lengths,
64 prompt + 64 output tokens, all requests at t=0; four contests, in each of which the two take turns:

* 1, 8 and 32 requests of one task with a prefix of 32 tokens;
* 8 requests of one task with a prefix of 512 tokens, where sharing it is what counts.

A prefix is a text of random tokens as the model itself computes it. prefixd has its keys and values as an artifact, resident
on the device. vLLM has the text before each prompt, and its prefix caching: the text's blocks are computed before the
clock starts, so it attends over the same keys and values and computes the same tokens as prefixd while it runs. Also
measured is the time from a process's start until it can serve, for vLLM with empty caches of compiled code and with full
ones.

**How vLLM is set up** (`vllm_worker.py`): compiled, which is its default, for all requests in one process with all
threads, since its default keeps a core free for a scheduler that polls; Intel's OpenMP and tcmalloc are preloaded where its
installation brings them, as its manual advises; blocks of 32 tokens.

**How to read the tables.** As those of `peft_comparison.py`. Steps are timed where tokens come out: prefixd's by the engine,
vLLM's by the calls of its `step`. Ratios above 1 mean that prefixd is faster.

**What is unfair, and to whom.**

* to vLLM: prefixd is at home here, one shape on one kind of machine; vLLM's CPU kernels are made for larger ones;
* to prefixd: it streams every token to a reader, through a second thread, while vLLM's `step` hands its outputs over in place;
  nothing of it is compiled;
* for vLLM: learned prefixes are not what its cache is for. It shares texts only, in whole blocks, and drops them when
  memory is short; here they fit, are whole blocks, and are there already.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.command_line import (
    DTYPES,
    Progress,
    contest_parser,
    limits_meter,
    parse,
    publish,
    rules,
)
from benchmarks.contest import compete
from benchmarks.hardware_limits import LimitsMeter, ModelCost, kv_bytes_per_token
from benchmarks.report import Machine, Report
from benchmarks.transformers_contestants import load_plain_model
from benchmarks.worker_contestant import WorkerContestant
from benchmarks.worker_protocol import Message, Worker
from benchmarks.workload import SCALES, Scale, Workload, bake_prefixes, save_prefix, write_model

_BUILD: Final = Path(__file__).resolve().parent.parent / "build" / "vllm"
_START: Final = "from start to ready: "


@dataclass(frozen=True, slots=True)
class Case:
    """So many requests of one task whose prefix has so many tokens."""

    num_requests: int
    num_virtual_tokens: int

    @property
    def name(self) -> str:
        return f"{self.num_requests}_requests_prefix_{self.num_virtual_tokens}"

    @property
    def task(self) -> str:
        return f"prefix-{self.num_virtual_tokens}"

    def workload(self, scale: Scale) -> Workload:
        """With the scale's lengths of prompt and output."""
        return replace(
            scale.workload,
            num_tasks=1,
            requests_per_task=self.num_requests,
            num_virtual_tokens=self.num_virtual_tokens,
        )


def cases(scale: Scale) -> list[Case]:
    """The four contests; fewer requests where the scale has fewer."""
    most, prefix = scale.workload.num_requests, scale.workload.num_virtual_tokens
    few = max(2, most // 4)
    return [Case(1, prefix), Case(few, prefix), Case(most, prefix), Case(few, 16 * prefix)]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints it; the last line is JSON."""
    parser = contest_parser("vllm_comparison", "prefixd against vLLM on the CPU")
    parser.add_argument(
        "--vllm-python", type=Path, default=_BUILD / "venv/bin/python", help="Python that has vLLM"
    )
    parser.add_argument("--vllm-module", default="benchmarks.vllm_worker", help="what it runs")
    parser.add_argument("--work", type=Path, default=_BUILD, help="model, logs, compiled code")
    arguments = parse(parser, argv)
    if not arguments.vllm_python.exists():
        parser.error(f"--vllm-python {arguments.vllm_python} is not there: run make bench-vllm")
    reports = run(arguments)
    publish(arguments.out, markdown(reports), text(reports), figures(reports))


def run(arguments: argparse.Namespace) -> dict[str, Report]:
    """Starts both programs, holds the contests; a report for each, by the case's name."""
    scale, dtype = SCALES[arguments.scale], DTYPES[arguments.dtype]
    progress, meter = Progress(), limits_meter(scale, dtype)
    machine = Machine.describe(("torch", "transformers"))
    setup, cost = _write_setup(arguments, scale)
    progress("model and prefixes written")
    with ExitStack() as stack:
        workers, seconds = _start(arguments, setup, stack, progress)
        versions = dict(machine.versions) | _versions(workers[1])
        report = Report(
            title="prefixd against vLLM on a CPU",
            benchmark="vllm_comparison",
            command=arguments.command,
            model=f"{scale.name}, {arguments.dtype}",
            machine=replace(machine, versions=versions),
            workload=scale.workload,
            cost=cost,
            limits=meter.limits(),
            results=(),
            further_seconds=seconds,
        )
        reports = {
            case.name: _hold(case, scale, arguments, workers, report, meter, progress)
            for case in cases(scale)
        }
    return {name: replace(report, limits=meter.limits()) for name, report in reports.items()}


def _write_setup(arguments: argparse.Namespace, scale: Scale) -> tuple[Message, ModelCost]:
    """The model once and for all, the prefixes for this run; what the workers are told."""
    folder: Path = arguments.work / f"{arguments.scale}-{arguments.dtype}"
    model_dir, prefix_dir = folder / "model", folder / "prefixes"
    if not (model_dir / "tokenizer.json").exists():  # written last
        write_model(model_dir, scale, DTYPES[arguments.dtype])
    draw = random.Random(0)
    vocab_size, work = scale.config["vocab_size"], scale.workload
    texts = {
        case.task: tuple(draw.randrange(vocab_size) for _ in range(case.num_virtual_tokens))
        for case in cases(scale)
    }
    prefix_dir.mkdir(exist_ok=True)
    for prefix in bake_prefixes(model_dir, texts):
        save_prefix(prefix_dir, prefix)
    plain = load_plain_model(model_dir)
    setup = {
        "model": str(model_dir),
        "dtype": arguments.dtype,
        "prefixes": str(prefix_dir),
        "texts": texts,
        "max_num_seqs": max(case.num_requests for case in cases(scale)),
        "max_model_len": max(map(len, texts.values())) + work.prompt_len + work.output_len,
        "kv_cache_bytes": scale.kv_cache_bytes,
        "threads": torch.get_num_threads(),
    }
    return setup, ModelCost.of(plain, kv_bytes_per_token(plain))


def _start(
    arguments: argparse.Namespace, setup: Message, stack: ExitStack, progress: Progress
) -> tuple[tuple[Worker, Worker], dict[str, float]]:
    """Both workers, prefixd's first, and how long their starts took; vLLM is started twice."""
    caches = arguments.work / "caches"
    shutil.rmtree(caches, ignore_errors=True)
    vllm = [*vllm_environment(arguments.vllm_python, caches, setup["threads"])]
    vllm += [str(arguments.vllm_python), "-m", arguments.vllm_module]
    log = arguments.work / "vllm.log"
    cold = Worker("vllm_cpu", vllm, setup, log)
    cold.close()
    progress(f"vLLM ready after {cold.start_seconds:.1f} s with empty caches")
    peer = Worker("vllm_cpu", vllm, setup, log)
    stack.callback(peer.close)
    progress(f"vLLM ready after {peer.start_seconds:.1f} s with full caches")
    command = [sys.executable, "-m", "benchmarks.prefixd_worker"]
    ours = Worker("prefixd", command, setup, arguments.work / "prefixd.log")
    stack.callback(ours.close)
    progress(f"prefixd ready after {ours.start_seconds:.1f} s")
    seconds = {
        f"{_START}prefixd": ours.start_seconds,
        f"{_START}vLLM": peer.start_seconds,
        f"{_START}vLLM with empty caches": cold.start_seconds,
    }
    return (ours, peer), seconds


def vllm_environment(python: Path, caches: Path, threads: int) -> list[str]:
    """The `env` command with what vLLM reads; preloads what its environment has of what its manual wants."""
    root = python.parent.parent
    wanted = ("lib/libiomp5.so", "lib/python*/site-packages/vllm/libs/libtcmalloc*.so*")
    preloaded = [str(path) for pattern in wanted for path in sorted(root.glob(pattern))[:1]]
    variables: Mapping[str, object] = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": 0,
        "VLLM_NO_USAGE_STATS": 1,
        "VLLM_CACHE_ROOT": caches / "vllm",
        "TORCHINDUCTOR_CACHE_DIR": caches / "inductor",
        "HF_HUB_OFFLINE": 1,
        "OMP_NUM_THREADS": threads,
        "KMP_BLOCKTIME": 5,  # milliseconds; vLLM's own choice where it sets the threads up itself
        "LD_PRELOAD": ":".join(preloaded),
    }
    return ["env", *(f"{name}={value}" for name, value in variables.items())]


def _versions(worker: Worker) -> dict[str, str]:
    return {f"vLLM's {name}": str(fact) for name, fact in worker.facts.items()}


def _hold(
    case: Case,
    scale: Scale,
    arguments: argparse.Namespace,
    workers: Iterable[Worker],
    report: Report,
    meter: LimitsMeter,
    progress: Progress,
) -> Report:
    """One contest, and its report."""
    progress(case.name)
    work = case.workload(scale)
    descriptions = ("prefixes resident", "texts in its prefix cache")
    contestants = [
        WorkerContestant(worker, description, case.task)
        for worker, description in zip(workers, descriptions, strict=True)
    ]
    requests = work.requests(scale.config["vocab_size"])
    results = compete(contestants, requests, rules(arguments, work), progress, meter.measure)
    return replace(report, workload=work, results=results)


def text(reports: Mapping[str, Report]) -> str:
    """Each contest's table and notes, then what they have in common."""
    parts = [
        "\n".join([f"## {name}", "", report.table(), "", *_listed(report.contest_notes())])
        for name, report in reports.items()
    ]
    common = next(iter(reports.values())).setting_notes()
    return "\n\n".join([*parts, "\n".join(["## All", "", *_listed(common)])])


def markdown(reports: Mapping[str, Report]) -> str:
    """The report to keep."""
    first = next(iter(reports.values()))
    return f"# {first.title}\n\n{first.machine.date}, `{first.command}`\n\n{text(reports)}\n"


def _listed(notes: Iterable[str]) -> list[str]:
    return [f"- {note}" for note in notes]


def figures(reports: Mapping[str, Report]) -> dict[str, Any]:
    """All contests' figures, and their ratios side by side."""
    seconds = next(iter(reports.values())).further_seconds
    ratios = {
        f"vs_vllm_cpu_{name}": round(report.ratio(report.results[1]), 3)
        for name, report in reports.items()
    }
    start = seconds[f"{_START}vLLM"] / seconds[f"{_START}prefixd"]
    cold = seconds[f"{_START}vLLM with empty caches"] / seconds[f"{_START}prefixd"]
    return {
        "benchmark": "vllm_comparison",
        "contests": {name: report.figures() for name, report in reports.items()},
        "ratios": ratios
        | {"vs_vllm_cpu_start": round(start, 3), "vs_vllm_cpu_start_cold": round(cold, 3)},
    }


if __name__ == "__main__":
    main()
