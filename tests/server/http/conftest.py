"""A client for the app with a fake engine; exceptions become the answers that clients would see."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tests.server.http.fakes import FakeEngine, make_app


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> TestClient:
    """No lifespan: the tests of the probes start it themselves."""
    return TestClient(make_app(engine))
