"""Which threads compute: the engine's, with as many helpers as there are cores, and no others.

torch divides its work by OpenMP, which keeps a team of helpers for every thread that ever computed. A helper that waits for work spins for a
moment, as the next piece mostly comes at once; but when there are more helpers than cores, GNU's OpenMP lets them all sleep between
two pieces, and a decode step has two hundred. So one team too many costs everybody a fifth of every step.

Called once at start on the main thread, and by threads that do background work when they begin. Does nothing where torch
brings no GNU OpenMP.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Final

import torch

logger = logging.getLogger(__name__)

_PAUSE_SOFT: Final = (
    1  # `omp_pause_soft`: the team ends, settings stay; it comes back when it is needed
)


def give_helpers_back() -> None:
    """Ends the calling thread's team: this thread will not compute for a while."""
    openmp = _openmp()
    if openmp is not None and openmp.omp_pause_resource_all(_PAUSE_SOFT) != 0:
        logger.warning("OpenMP keeps the main thread's helpers; steps may take longer")


def compute_alone() -> None:
    """The calling thread will have no team: what it computes takes one core, and disturbs no step."""
    openmp = _openmp()
    if openmp is not None:
        torch.get_num_threads()  # the first call in a thread sets its number, to be changed only then
        openmp.omp_set_num_threads(1)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The library that torch has loaded; loading it again gives the same one."""
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    for path in found:
        try:
            openmp = ctypes.CDLL(str(path))
        except OSError:
            continue
        if hasattr(openmp, "omp_pause_resource_all") and hasattr(openmp, "omp_set_num_threads"):
            return openmp
    return None
