"""What HTTP costs: 32 streams from `prefixd serve`, against the same engine used directly. And how fast it starts.

**What is measured.** The same requests with the same prefixes, all resident, through

* `http`: a server in a process of its own, one streamed connection for each request;
* `engine`: the engine in this process, its streams read by coroutines.

They take turns; whoever waits does nothing. The time from the start of the server's process until it says that
it is ready is in the notes: interpreter, imports, weights, packing, self-check.

**Why it should cost little.** The engine thread computes in torch, which holds no lock of Python meanwhile; events
are encoded and sent by the event loop in the gaps. On few cores their work is taken from the model's threads.

**How to read it.** `vs_engine` is the server's tokens per second over the engine's; 0.95 or more is the goal.

**Unfair to the server:** the client runs on the same cores, and asks for token ids beside the text so that all
tokens can be compared. Unfair to nobody: that the engine alone decodes text and streams as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

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
from benchmarks.hardware_limits import ModelCost, kv_bytes_per_token
from benchmarks.http_contestant import HttpServer
from benchmarks.prefixd_contestant import Prefixd
from benchmarks.report import Machine, Report
from benchmarks.transformers_contestants import load_plain_model
from benchmarks.workload import SCALES, random_prefixes, write_model


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints it; the last line is JSON."""
    parser = contest_parser("server_overhead", "the HTTP server against the engine used directly")
    arguments = parse(parser, argv)
    report = run(arguments)
    publish(arguments.out, report.markdown(), report.text(), report.figures())


def run(arguments: argparse.Namespace) -> Report:
    """Starts the server, publishes the same prefixes on both sides, lets both take turns."""
    scale, dtype = SCALES[arguments.scale], DTYPES[arguments.dtype]
    work = scale.workload
    progress, machine = Progress(), Machine.describe(("torch", "transformers"))
    meter = limits_meter(scale, dtype)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="prefixd-bench-")))
        model_dir = directory / "model"
        write_model(model_dir, scale, dtype)
        plain = load_plain_model(model_dir)
        cost = ModelCost.of(plain, kv_bytes_per_token(plain))
        del plain
        http = HttpServer(
            model_dir,
            directory / "http",
            kv_cache_bytes=scale.kv_cache_bytes,
            threads=torch.get_num_threads(),
        )
        stack.callback(http.close)
        progress(f"server ready after {http.start_seconds:.1f} s")
        prefixes = list(random_prefixes(scale, dtype, work.tasks()))
        engine = Prefixd(
            model_dir,
            directory / "store",
            prefixes,
            kv_cache_bytes=scale.kv_cache_bytes,
            cold=False,
            name="engine",
        )
        stack.callback(engine.close)
        http.upload({prefix.task: engine.artifact(prefix) for prefix in prefixes})
        requests = work.requests(scale.config["vocab_size"])
        agreed = rules(arguments, work)
        results = compete([http, engine], requests, agreed, progress, meter.measure)
    return Report(
        title="prefixd over HTTP against its engine, on a CPU",
        benchmark="server_overhead",
        command=arguments.command,
        model=f"{scale.name}, {arguments.dtype}",
        machine=machine,
        workload=work,
        cost=cost,
        limits=meter.limits(),
        results=results,
        further_seconds={"from the server's start to ready": http.start_seconds},
    )


if __name__ == "__main__":
    main()
