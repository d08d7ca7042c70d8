"""What a load test learns from the server, and what it says when it learns nothing."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from loadtest.errors import LoadTestError
from loadtest.server_view import ServerView, counters, difference
from loadtest.wire import Origin
from tests.prefix_store.builders import TINY_BASE
from tests.server.http.fakes import FakeEngine, make_app

ORIGIN = Origin.of("http://server")


def view(api_key: str | None = None, admin_key: str | None = None) -> ServerView:
    app = make_app(FakeEngine(), api_key="the-api-key")
    return ServerView(ORIGIN, api_key, admin_key, TestClient(app, base_url="http://server"))


def test_it_sees_base_tasks_and_vocabulary() -> None:
    with view("the-api-key") as server:
        served = server.look()

    assert (served.base.name, served.base.max_model_len) == ("org/tiny", 128)
    assert [(t.name, t.max_model_len) for t in served.tasks] == [("clerk", 123), ("poet", 125)]
    assert served.vocab_size == TINY_BASE.vocab_size
    assert served.version == "9.9.9"


def test_the_admin_key_opens_inference_too() -> None:
    with view(admin_key="the-admin-key") as server:
        assert server.look().tasks


@pytest.mark.parametrize("key", [None, "wrong-key"])
def test_a_wrong_key_is_named_by_its_flag(key: str | None) -> None:
    with view(key) as server:
        with pytest.raises(LoadTestError, match="another key: --api-key or PREFIXD_API_KEY"):
            server.look()
        assert server.metrics_text() is None


def test_another_server_is_told_apart() -> None:
    app = make_app(FakeEngine())
    origin = Origin.of("http://server/v1")
    client = TestClient(app, base_url="http://server")
    with (
        ServerView(origin, None, None, client) as server,
        pytest.raises(LoadTestError, match=r"expected 200, got 404 .* is it a prefixd server"),
    ):
        server.look()


def test_a_server_that_does_not_answer_is_named() -> None:
    with (
        ServerView(Origin.of("http://127.0.0.1:9"), None, None) as server,
        pytest.raises(LoadTestError, match=r"can not reach http://127.0.0.1:9: .* running"),
    ):
        server.look()


def test_the_difference_of_two_scrapes_is_by_series() -> None:
    with view("the-api-key") as server:
        before = server.metrics_text()
    assert before is not None
    name = 'prefixd_prefix_cache_lookups_total{result="disk"} '
    assert f"{name}0.0" in before
    after = before.replace(f"{name}0.0", f"{name}7.0")

    found = difference(before, after)

    assert found is not None
    assert {series for series, value in found.items() if value} == {
        'prefix_cache_lookups_total{result="disk"}'
    }
    assert found['prefix_cache_lookups_total{result="disk"}'] == 7
    assert set(found) == set(counters(before) or {})
    assert difference(None, after) is None
