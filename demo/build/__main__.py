"""``python -m demo.build [all|tokenizer|base|tasks|export|scores]``: rebuild the demo (``make demo-model``).

Each step reads what the one before left in the work directory, so that it can be repeated alone; what was finished
there is not done again, and what was killed goes on.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from demo.build.base import (
    NUM_STEPS,
    base_report_path,
    finish_base,
    require_copying,
    train_base,
)
from demo.build.export import export_all, write_scores
from demo.build.measure import prepare_task
from demo.build.parallel import over_tasks, show_progress
from demo.build.targets import mean_match
from demo.build.tokenizer import build_tokenizer, load_tokenizer

log = logging.getLogger("demo.build")

DEFAULT_WORK_DIR: Final = Path("build/demo")


def run_tokenizer(args: argparse.Namespace) -> None:
    if not (args.work_dir / "model" / "tokenizer.json").exists():
        build_tokenizer(args.work_dir / "model")


def run_base(args: argparse.Namespace) -> None:
    if not base_report_path(args.work_dir).exists():
        tokenizer = load_tokenizer(args.work_dir / "model")
        model = train_base(tokenizer, args.work_dir, args.base_steps)
        finish_base(model, tokenizer, args.work_dir)
    require_copying(args.work_dir)


def run_tasks(args: argparse.Namespace) -> None:
    over_tasks(prepare_task, args.work_dir)


def run_export(args: argparse.Namespace) -> None:
    export_all(args.work_dir)


def run_scores(args: argparse.Namespace) -> None:
    for name, row in write_scores(args.work_dir)["tasks"].items():
        log.info("%s: base %s, prefix %.1f", name, row["base"]["exact_match"], mean_match(row))


STEPS: Final[dict[str, Callable[[argparse.Namespace], None]]] = {
    "tokenizer": run_tokenizer,
    "base": run_base,
    "tasks": run_tasks,
    "export": run_export,
    "scores": run_scores,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.build", description=__doc__)
    parser.add_argument("step", nargs="?", default="all", choices=["all", *STEPS])
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_WORK_DIR)
    parser.add_argument("--base-steps", type=int, default=NUM_STEPS, help="of pretraining")
    args = parser.parse_args()
    show_progress()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name, run in STEPS.items():
        if args.step in ("all", name):
            log.info("step: %s", name)
            run(args)


if __name__ == "__main__":
    main()
