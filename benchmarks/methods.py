"""Ways to teach one base a task, on the demo's tasks: quality, cost of training, cost of serving. `make bench-methods`.

**What is measured.** The bundled base in float32 on the CPU learns each of the demo's five tasks by

* a **prefix, direct**: keys and values themselves (`prefixd train`, used as a library), 16 virtual tokens, record-qa 32;
* a **prefix, MLP**: Li & Liang's reparameterization, folded away when it is stored;
* **prompt tuning**: as many embeddings at the input layer (PEFT);
* **LoRA**: rank 4 on all linear layers (PEFT);
* **full fine-tuning** of all weights (transformers).

All see the same 2,000 examples in the same order, in batches of 16, for the steps that the demo's own prefix of the task has
(400 to 1,200), with the same loss on the answer's tokens, AdamW, warm-up, cosine, clipping; each keeps the best of
ten evaluations by the loss on 100 held-out examples. Prefixes and soft prompts begin as the same text. The learning rate of
each method is the best of three, on two tasks together (record-to-sentence, record-qa) with one seed, **by the held-out examples**. (The first
plan chose on record-to-sentence alone. A partial run showed the chosen rate of the direct prefix failing on record-qa, on its test
items; so the second task was added, for all methods.)

**Stages**, each of which can be run apart (`--only`), in this order: `tune` chooses the learning rates; `compare` is the main
table, with three seeds; `low-data` is the paper's study of few examples (50 to 2,000, another part for each seed); `lengths`
is that of the prefix's length; `serving` measures throughput at 1, 8 and 32 tasks (`methods_serving.py` says how); `report`
only writes what is known. Each run is kept in the folder as soon as it is done. Begun again, the benchmark goes on where it
stopped; a folder belongs to one base.

**How to read the table.** Exact match in percent of 500 test items whose names no text of pretraining has, mean and standard
deviation over the seeds. `trained` counts the parameters that got a gradient, `stored` those that a task needs afterwards,
`kB` is their file in float32. `400 steps` is the CPU time of the optimizer steps on record-to-sentence, one thread, the median
step times their number, which other work on the machine moves little; `peak` the memory that training needed beyond the libraries, base included. `tokens/s`: 32 requests at
once, spread evenly over so many tasks; `MB`: the tensors that the tasks hold, in float32, beside one base; for full
fine-tuning they are the models themselves. The three methods that end as keys and values before the request are one and
the same to a server, so they share one measurement.

**What is unfair, and to whom.**

* to prefixes and soft prompts: 2.8 M parameters are few, and a frozen model can only be steered to what it can do. Such
  a base is also cheap to copy: with 7 B parameters, 32 copies would be 450 GB;
* to LoRA and full fine-tuning in serving: they run in transformers' `generate`, not in a server; one that is built for adapters
  would mix them faster than PEFT does. With one task LoRA could be merged into the weights, and then costs nothing;
* to prefixes in memory: their peak has in it what `prefixd train` does beside training: it measures the attention on the
  prefix, writes checkpoints and proves artifacts. The time of a step is of the step alone for everybody;
* to everybody alike: three learning rates are few, and the best on two tasks may suit another worse; the held-out examples,
  which also choose the step that is kept, are 100 more than the few of the low-data study. A prefix could be
  served as bfloat16, half of its kB, and so could all the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

import demo
from benchmarks.methods_plan import FULL, METHODS, SMALL, STAGES, Grid, Job, Method, Stage
from benchmarks.methods_plan import distinct as distinct_jobs
from benchmarks.methods_report import SERVING_FILE, chosen_rates, figures, markdown, plots
from benchmarks.methods_runner import Progress, run_jobs, unfinished
from benchmarks.methods_serving import measure
from benchmarks.methods_training import Workplace, keep, read
from benchmarks.report import Machine
from trainer.data import digest_of_file

DEFAULT_FOLDER: Final = Path("build/methods")
_BASE_FILE: Final = "base.json"
_PACKAGES: Final = ("torch", "transformers", "peft")
_SERVING_MINUTES: Final = 3.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description="prefixes, prompt tuning, LoRA and full fine-tuning on the demo's tasks",
    )
    parser.add_argument("--model", type=Path, default=demo.MODEL_DIR, help="folder of the base")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_FOLDER, help="results so far, and the report"
    )
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"some of: {', '.join(STAGES)}"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="trainings side by side, one thread each; 0: in this process",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="torch threads while serving"
    )
    parser.add_argument("--small", action="store_true", help="a minute, to see that it works")
    parser.add_argument("--plan", action="store_true", help="say what would be run, and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stages, writes the report, prints the tables; the last line is JSON."""
    arguments = parse_arguments(argv)
    grid = SMALL if arguments.small else FULL
    stages: Sequence[Stage] = [s for s in STAGES if s in (arguments.only or STAGES)]
    place = Workplace(arguments.model, arguments.out, grid.num_validation)
    _claim(place, arguments.small)
    for line in describe_plan(grid, place, stages, arguments.jobs):
        print(line, file=sys.stderr, flush=True)
    if arguments.plan:
        return
    for stage in stages:
        run_stage(stage, grid, place, arguments)
    given = sys.argv[1:] if argv is None else argv
    report(grid, place, shlex.join(["python", "-m", "benchmarks.methods", *given]))


def _claim(place: Workplace, small: bool) -> None:
    """Makes the folder this base's own. Exits if it is another's: old and new results would stand side by side."""
    now = {
        "model": digest_of_file(place.model_dir / "model.safetensors"),
        "tokenizer": digest_of_file(place.model_dir / "tokenizer.json"),
        "small": small,
    }
    path = place.folder / _BASE_FILE
    if path.exists() and read(path) != now:
        sys.exit(
            f"{place.folder} holds results of another base or size: choose another --out, or remove it"
        )
    place.folder.mkdir(parents=True, exist_ok=True)
    keep(path, now)


def describe_plan(
    grid: Grid, place: Workplace, stages: Sequence[Stage], num_processes: int
) -> list[str]:
    """How many trainings each stage adds to those before it, and how long they take together."""
    rates = chosen_rates(grid, place) or _supposed_rates(grid)
    lines, jobs = [], list[Job]()
    for stage in stages:
        before = len(distinct_jobs(jobs))
        jobs += grid.jobs(stage, rates)
        if added := len(distinct_jobs(jobs)) - before:
            lines.append(f"{stage}: {added} trainings")
    left = unfinished(jobs, place)
    minutes = Progress(left, num_processes).minutes_left()
    if "serving" in stages and not (place.folder / SERVING_FILE).exists():
        minutes += _SERVING_MINUTES
    kept = len(distinct_jobs(jobs)) - len(left)
    lines.append(
        f"in all {len(left)} to do and {kept} kept, about {minutes:.0f} minutes with {num_processes} processes"
    )
    return lines


def _supposed_rates(grid: Grid) -> dict[Method, float]:
    """For counting only: before the stage `tune`, any of its rates stands for the one that it will choose."""
    return {method: grid.rates[method][0] for method in METHODS}


def run_stage(stage: Stage, grid: Grid, place: Workplace, arguments: argparse.Namespace) -> None:
    """What is not done of it yet. Exits where the learning rates are missing."""
    if stage == "serving":
        serve(grid, place, arguments.threads)
    elif stage != "report":
        rates = {} if stage == "tune" else chosen_rates(grid, place)
        if rates is None:
            sys.exit(f"{stage}: the learning rates are not chosen yet: run the stage tune before")
        print(f"stage {stage}", file=sys.stderr, flush=True)
        run_jobs(grid.jobs(stage, rates), place, arguments.jobs)


def serve(grid: Grid, place: Workplace, num_threads: int) -> None:
    """Measures unless a measurement is kept."""
    path = place.folder / SERVING_FILE
    if path.exists():
        return
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = measure(
            place.model_dir, grid, lambda text: print(text, file=sys.stderr, flush=True)
        )
    finally:
        torch.set_num_threads(before)
    keep(path, found)


def report(grid: Grid, place: Workplace, command: str) -> None:
    """`report.md`, `figures.json` and the plots into the folder; tables and one JSON line to standard output."""
    found: dict[str, Any] = {
        "benchmark": "methods",
        "command": command,
        "machine": asdict(Machine.describe(_PACKAGES)),
        "grid": asdict(grid),
        **figures(grid, place),
    }
    tables = markdown(found, grid)
    head = f"# Methods compared\n\n{found['machine']['date']}, `{command}`\n\n"
    images = plots(found, grid)
    shown = "".join(f"\n![{name.removesuffix('.png')}]({name})\n" for name in images)
    (place.folder / "report.md").write_text(head + tables + shown, encoding="utf-8")
    for name, data in images.items():
        (place.folder / name).write_bytes(data)
    keep(place.folder / "figures.json", found)
    print(tables)
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
