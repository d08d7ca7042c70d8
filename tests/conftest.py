"""Shared by all tests: one torch thread, a clean environment, no handler of logs left behind, kernels on the CPU where there is no GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

# Tiny tensors: a second thread costs more than it computes, and the test runner uses the other core.
torch.set_num_threads(1)

# Read by triton when it is imported, which no test has done yet.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No PREFIXD_* variable of the developer's shell reaches a test."""
    for name in [n for n in os.environ if n.startswith("PREFIXD_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_log_handler_is_left() -> Iterator[None]:
    """A command that ran here set logging up, on a stream that is closed when its test ends."""
    root = logging.getLogger()
    level = root.level
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's own are of other classes
            root.removeHandler(handler)
            root.setLevel(level)
