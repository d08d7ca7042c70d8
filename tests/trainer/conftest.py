"""The demo's base and an engine around it, loaded once for all tests of the trainer that judge prefixes."""

from __future__ import annotations

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
