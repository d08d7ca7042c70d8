"""A process a core, one thread each: the demo's model is too small for two threads to share its work well.

Called by ``__main__`` and ``export``, with functions that leave what they found in the work directory.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from demo.build.tasks import TASKS


def show_progress() -> None:
    """The log of this process, to standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _begin() -> None:
    show_progress()
    torch.set_num_threads(1)


def over_tasks(run: Callable[[Path, str], None], work_dir: Path) -> None:
    """``run(work_dir, task)`` for each task, those of most steps first. Raises what the first that failed has raised."""
    names = sorted(TASKS, key=lambda name: -TASKS[name].steps)
    processes = min(len(names), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin) as pool:
        for future in [pool.submit(run, work_dir, name) for name in names]:
            future.result()
