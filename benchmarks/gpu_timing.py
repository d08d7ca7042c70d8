"""How `gpu.py` takes times: replays of a captured graph on a GPU, a plain clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

_MIN_SECONDS = 1e-9


def kernel_ms(run: Callable[[int], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of one `run(i)`, median. On a GPU as part of a graph of ten, so that no launch is waited for.

    `run` gets numbers 0..9, to work on memory that the calls before it have not just brought into the cache.
    """
    if device.type != "cuda":
        return clock_ms(lambda: run(0), device, repeats)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles before anything is captured
        for i in range(3):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(10):
            run(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 10)
    return statistics.median(times)


def clock_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of one `run()` by the clock, until the device is done; median, after three that do not count."""
    times = []
    for number in range(repeats + 3):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        if number >= 3:
            times.append(time.perf_counter() - started)
    return max(statistics.median(times), _MIN_SECONDS) * 1000


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(slow_ms: float, fast_ms: float) -> float:
    """How many times faster; NaN-free."""
    return slow_ms / fast_ms if fast_ms > 0 and math.isfinite(slow_ms) else 0.0
