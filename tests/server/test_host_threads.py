"""Teams of helpers are counted where the kernel lists a process's threads, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from server import host_threads

ROOT = Path(__file__).parents[2]

needs_gnu_openmp = pytest.mark.skipif(
    host_threads._openmp() is None or not Path("/proc/self/task").exists(),
    reason="torch brings no GNU OpenMP here",
)


def run(code: str) -> list[int]:
    """What the code prints, as numbers; `threads()` counts, `compute()` needs helpers if it may have some."""
    prelude = """
        import os, threading
        import torch
        from server.host_threads import compute_alone, give_helpers_back
        def threads(): return len(os.listdir("/proc/self/task"))
        def compute(): torch.ones(1_000_000).isfinite().all()
        torch.set_num_threads(3)
        before = threads()
    """
    text = textwrap.dedent(prelude) + textwrap.dedent(code)
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


@needs_gnu_openmp
def test_a_thread_that_gave_its_helpers_back_has_none_until_it_computes_again() -> None:
    code = """
        compute(); print(threads() - before)
        give_helpers_back(); print(threads() - before)
        compute(); print(threads() - before)
    """
    assert run(code) == [2, 0, 2]


@needs_gnu_openmp
def test_a_thread_that_computes_alone_has_no_helpers_and_takes_them_from_nobody() -> None:
    code = """
        def work():
            compute_alone()
            compute()
            print(threads() - before - 1)
        thread = threading.Thread(target=work); thread.start(); thread.join()
        compute(); print(threads() - before)
        print(torch.get_num_threads())
    """
    assert run(code) == [0, 2, 3]


def test_without_gnu_openmp_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_threads, "_openmp", lambda: None)
    host_threads.give_helpers_back()
    host_threads.compute_alone()
