"""``python -m demo.build [all|tokenizer|base|prefixes|export|scores]``: rebuild the demo.

Each step reads what the one before left in the work directory, so that it can be repeated alone.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from demo.build.base import NUM_STEPS, finish_base, load_base, train_base
from demo.build.export import export_all, save_raw, write_scores
from demo.build.prefixes import train_prefix
from demo.build.scores import rare_literals
from demo.build.tasks import TASKS
from demo.build.tokenizer import build_tokenizer, load_tokenizer

log = logging.getLogger("demo.build")

DEFAULT_WORK_DIR: Final = Path("build/demo")
NUM_THREADS: Final = 2


def run_tokenizer(args: argparse.Namespace) -> None:
    build_tokenizer(args.work_dir / "model")


def run_base(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.work_dir / "model")
    model = train_base(tokenizer, args.work_dir, args.base_steps)
    finish_base(model, tokenizer, args.work_dir)


def run_prefixes(args: argparse.Namespace) -> None:
    model_dir = args.work_dir / "model"
    model, tokenizer = load_base(model_dir), load_tokenizer(model_dir)
    for task in TASKS.values():
        if args.task not in (None, task.name):
            continue
        if rare := rare_literals(tokenizer, task):
            raise RuntimeError(f"{task.name}: the corpus hardly holds {rare}")
        trained = train_prefix(model, tokenizer, task)
        save_raw(args.work_dir, task.name, trained)
        log.info(
            "%s  validation loss %.4f  first token %.4f  %.0f s",
            task.name,
            trained.validation_loss,
            trained.first_token_probability,
            trained.seconds,
        )


def run_export(args: argparse.Namespace) -> None:
    export_all(args.work_dir)


def run_scores(args: argparse.Namespace) -> None:
    for name, row in write_scores(args.work_dir)["tasks"].items():
        log.info("%s: %s", name, {way: values["exact_match"] for way, values in row.items()})


STEPS: Final[dict[str, Callable[[argparse.Namespace], None]]] = {
    "tokenizer": run_tokenizer,
    "base": run_base,
    "prefixes": run_prefixes,
    "export": run_export,
    "scores": run_scores,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.build", description=__doc__)
    parser.add_argument("step", nargs="?", default="all", choices=["all", *STEPS])
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_WORK_DIR)
    parser.add_argument("--base-steps", type=int, default=NUM_STEPS, help="of pretraining")
    parser.add_argument("--task", choices=list(TASKS), help="train this prefix only")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(NUM_THREADS)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name, run in STEPS.items():
        if args.step in ("all", name):
            log.info("step: %s", name)
            run(args)


if __name__ == "__main__":
    main()
