"""prefixd against PEFT and transformers: many tasks, one base model, all requests at once. `make bench` runs it.

**What is measured.** 8 tasks with 4 requests each arrive together; every task has a prefix of its own, which is a
text of 32 tokens as the model itself computes it. The same random-weight model, the same prompts, greedy, fixed
output lengths, in one process, taking turns:

* `prefixd`: the engine behind the server, all requests in one batch that mixes the tasks. Each round begins
  with the prefixes on disk only: they are read, verified, loaded and shared while the clock runs;
* `peft_single`: PEFT's `generate` as its documentation shows it, one request after another;
* `peft_batched`: the most that PEFT can put together, the 4 requests of a task in one `generate` call;
* `hf_static`: transformers' `generate` over all 32 requests in one batch;
* `hf_continuous`: transformers' continuous batching (`generate_batch`), its manager kept between rounds.

PEFT has the prefixes' keys and values. transformers alone has no learned prefixes, so each prompt begins with the
prefix's text: the same keys and values, computed again. `--without-prefixes` leaves PEFT out and gives everybody
the bare prompts, which is the same work for all.

Output tokens per second count all tokens of all requests over the time until the last one is done. TTFT
(time to first token) counts from the common arrival, so whoever serves one after another lets the others
wait; "alone" is that of a single request with nobody else there.

**Why batching wins.** A decode step must read every weight once from memory, 1 GB here, whether it computes
one row or thirty-two. With one row, the arithmetic is done long before the next weights have come: the step
is bound by memory, and further rows are nearly free until multiplying takes as long as reading (the
crossover is where 2 * parameters * rows / FLOPs exceeds bytes / bandwidth, about 15 rows on the machine of
the first report). PEFT cannot fill a step, since one adapter is active at a time. prefixd can: a prefix is
just K/V that a row attends over, so rows of different tasks share the step and its weights.

**Why a batch alone is not enough.** transformers fills its steps as well, and what is left is how fast a step is.
On a CPU its linear layers repack their weights in every step, where prefixd packs them once at start; its attention
copies or masks: a static batch attends in bfloat16 with a slow kernel for grouped heads, and continuous batching
with one mask over the tokens of all requests, most of which a row must not see.

**How to read the table.** `ms/step` is the median step that decodes one token for `rows` requests. `limit`
is the least that such a step could take on this machine, from bandwidth and matrix speed measured in the
same run (`hardware_limits.py`); `of limit` is the share of it that was reached, which says how much is left
to gain without better hardware. `measured` below 100 % means that a full pass would have taken too long: the
calls of a round are repeated on paper to make a whole pass. `prefixd is` above 1 means prefixd is faster.
The notes below the table say how many cores other processes used meanwhile: a quiet machine shows 0.0.

In float32 everybody gives the same tokens (the test of this script holds them to it). In bfloat16 sums are
rounded in another order and random weights leave many near ties, so greedy texts part early, also those of
PEFT with itself at two batch sizes; the notes show all pairs.

**What is unfair, and to whom.**

* to PEFT: everything arrives at once, which suits a batching server best; with one lonely request the two
  are about equal. PEFT runs uncompiled with the attention that transformers takes by default
  (`--peft-attention eager` tries the other one);
* to transformers: it computes 32 text tokens more than prefixd, once per request (static) or per task
  (continuous, whose pages are as long as the text so that they are shared). That is a third of the prompts and, with
  64 output tokens, about a tenth of a pass; `--without-prefixes` takes it away. It runs uncompiled,
  as prefixd does: `torch.compile` needs a C++ compiler and minutes, and changes no weight's layout;
* for transformers: its attention implementation and its tokens per step are the fastest of those tried in this
  very run, and the notes name them;
* to prefixd: it reads prefixes from disk in every round while PEFT has its adapters in memory; it checks,
  streams and detokenizes every token of every request, which `generate` does not; all prompts have one
  length and all answers too, so that static batches hold no padding and nobody waits for the longest;
* to neither: there is no HTTP on either side, and random weights take the same time as trained ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.command_line import (
    DTYPES,
    Progress,
    contest_parser,
    limits_meter,
    parse,
    publish,
    rules,
)
from benchmarks.contest import Contestant, compete
from benchmarks.hardware_limits import ModelCost, kv_bytes_per_token
from benchmarks.peft_contestants import Attention, PeftGenerate, load_peft_model
from benchmarks.prefixd_contestant import Prefixd
from benchmarks.report import Machine, Report
from benchmarks.transformers_contestants import (
    ContinuousBatch,
    StaticBatch,
    Texts,
    fastest,
    load_plain_model,
)
from benchmarks.workload import (
    SCALES,
    Request,
    Scale,
    TaskPrefix,
    bake_prefixes,
    text_prefixes,
    write_model,
)

_PACKAGES: Final = ("torch", "transformers", "peft")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints it; the last line is JSON."""
    parser = contest_parser(
        "peft_comparison",
        "prefixd against PEFT and transformers: output tokens/s and TTFT, and the share of the machine's limit",
    )
    parser.add_argument("--peft-attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument(
        "--without-prefixes",
        action="store_true",
        help="bare prompts for prefixd and transformers, without PEFT",
    )
    arguments = parse(parser, argv)
    report = run(arguments)
    publish(arguments.out, report.markdown(), report.text(), report.figures())


def run(arguments: argparse.Namespace) -> Report:
    """Sets everything up, lets the contestants compete, measures the machine between their turns."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # continuous batching warns of what is chosen here
    scale, dtype = SCALES[arguments.scale], DTYPES[arguments.dtype]
    if arguments.without_prefixes:
        scale = replace(scale, workload=replace(scale.workload, num_virtual_tokens=0))
    progress = Progress()
    machine = Machine.describe(_PACKAGES)
    meter = limits_meter(scale, dtype)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="prefixd-bench-")))
        write_model(directory / "model", scale, dtype)
        progress("model written")
        contestants, cost = _set_up(directory, scale, arguments, stack, progress)
        progress("contestants set up")
        requests = scale.workload.requests(scale.config["vocab_size"])
        agreed = rules(arguments, scale.workload)
        results = compete(contestants, requests, agreed, progress, meter.measure)
    return Report(
        title="prefixd against PEFT and transformers on a CPU",
        benchmark="peft_comparison",
        command=arguments.command,
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
    arguments: argparse.Namespace,
    stack: ExitStack,
    progress: Progress,
) -> tuple[list[Contestant], ModelCost]:
    """The contestants, ours first, and what a step costs; `stack` closes them."""
    texts = {} if arguments.without_prefixes else text_prefixes(scale)
    model_dir = directory / "model"
    prefixes = bake_prefixes(model_dir, texts)
    plain = load_plain_model(model_dir)
    requests = scale.workload.requests(scale.config["vocab_size"])
    # The peers are tried while prefixd is not there yet: more memory for them.
    peers = _peft(model_dir, scale, prefixes, arguments.peft_attention) if prefixes else []
    peers += _transformers(plain, scale, texts, requests, progress)
    prefixd = Prefixd(model_dir, directory / "store", prefixes, kv_cache_bytes=scale.kv_cache_bytes)
    for contestant in (prefixd, *peers):
        stack.callback(contestant.close)
    return [prefixd, *peers], ModelCost.of(plain, kv_bytes_per_token(plain))


def _peft(
    model_dir: Path, scale: Scale, prefixes: Sequence[TaskPrefix], attention: Attention
) -> list[Contestant]:
    model = load_peft_model(model_dir, prefixes, attention=attention)
    group = scale.workload.requests_per_task
    alone = f"one request after another, attention {attention}"
    together = f"the {group} requests of a task together, attention {attention}"
    return [
        PeftGenerate(model, "peft_single", alone, 1),
        PeftGenerate(model, "peft_batched", together, group),
    ]


def _transformers(
    model: PreTrainedModel,
    scale: Scale,
    texts: Texts,
    requests: Sequence[Request],
    progress: Progress,
) -> list[Contestant]:
    """The fastest static batch and the fastest continuous one, of those that a CPU can run."""
    work = scale.workload
    most = work.num_requests * (work.num_virtual_tokens + work.prompt_len + work.output_len)
    attentions: tuple[Attention, ...] = ("sdpa", "eager")
    static = [StaticBatch(model, texts, attention) for attention in attentions]
    continuous = [
        ContinuousBatch(
            model,
            texts,
            attention,
            chunk=chunk,
            max_requests=work.num_requests,
            max_tokens=most,
        )
        for attention, chunk in (("sdpa", most), ("sdpa", 512), ("sdpa", 256), ("paged|eager", 512))
    ]
    output_len = max(3, work.output_len // 8)
    return [
        fastest(candidates, requests, output_len, progress) for candidates in (static, continuous)
    ]


if __name__ == "__main__":
    main()
