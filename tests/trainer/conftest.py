"""The demo's base and an engine around it, loaded once for all tests of the trainer that judge prefixes; and signals that
come back.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

import demo
from server.engine.tokenizer import Tokenizer
from server.model.loader import LoadedModel, load_model
from trainer.engine_in_process import EngineInProcess


@pytest.fixture(scope="session")
def demo_model() -> LoadedModel:
    model = load_model(demo.MODEL_DIR, device=torch.device("cpu"), dtype="float32")
    model.module.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.load(demo.MODEL_DIR)


@pytest.fixture(scope="session")
def demo_engine(demo_model: LoadedModel, demo_tokenizer: Tokenizer) -> EngineInProcess:
    return EngineInProcess(demo_model, demo_tokenizer)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A command takes signals over; the test runner wants them back."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)
