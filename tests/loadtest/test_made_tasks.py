"""Tasks that a load test makes are gone after it, and no other task is ever touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from loadtest.errors import BadLoad, LoadTestError
from loadtest.made_tasks import MadeTasks, made_tasks, random_prefix
from loadtest.server_view import ServerView
from loadtest.wire import Origin
from prefix_store.artifact import decode
from tests.server.http.fakes import ADMIN, ADMIN_KEY, FakeEngine, make_app

THERE = ["clerk", "poet"]


@pytest.fixture
def client() -> TestClient:
    return TestClient(make_app(FakeEngine()), base_url="http://server")


@pytest.fixture
def server(client: TestClient) -> Iterator[ServerView]:
    with ServerView(Origin.of("http://server"), None, ADMIN_KEY, client) as view:
        yield view


def names(client: TestClient) -> list[str]:
    listing = client.get("/admin/v1/tasks", headers=ADMIN).json()
    return [task["task"] for task in listing["data"]]


def make(server: ServerView, count: int = 3, **changes: Any) -> Any:
    tasks = MadeTasks(server, "bench", lambda *_: None)
    return made_tasks(tasks, count, 4, seed=0, **{"keep": False, **changes})


def test_they_are_there_for_the_time_of_the_test_and_all_differ(
    client: TestClient, server: ServerView
) -> None:
    with make(server) as made:
        assert made == ["bench-0001", "bench-0002", "bench-0003"]
        listing = client.get("/admin/v1/tasks", headers=ADMIN).json()["data"]
        assert [task["task"] for task in listing] == [*made, *THERE]
        assert len({task["digest"] for task in listing}) == 5
        body = {"task": made[0], "prompt": [1], "max_tokens": 3}
        assert client.post("/generate", json=body).status_code == 200

    assert names(client) == THERE


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, LoadTestError])
def test_they_are_removed_whatever_ends_the_test(
    client: TestClient, server: ServerView, stopped: type[BaseException]
) -> None:
    with pytest.raises(stopped), make(server):
        raise stopped

    assert names(client) == THERE


def test_an_interrupt_between_two_uploads_leaves_none(
    client: TestClient, server: ServerView
) -> None:
    def interrupt(what: str, done: int, _: int) -> None:
        if (what, done) == ("making tasks", 2):
            raise KeyboardInterrupt

    tasks = MadeTasks(server, "bench", interrupt)
    with pytest.raises(KeyboardInterrupt), made_tasks(tasks, 5, 4, seed=0, keep=False):
        pytest.fail("not all were made")

    assert names(client) == THERE


def test_an_upload_whose_answer_was_lost_is_removed_too(
    client: TestClient, server: ServerView, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = client.request

    def lossy(method: str, url: str, **arguments: Any) -> Any:
        response = request(method, url, **arguments)
        if url.endswith("bench-0002") and method == "PUT":
            raise KeyboardInterrupt
        return response

    monkeypatch.setattr(client, "request", lossy)
    with pytest.raises(KeyboardInterrupt), make(server):
        pytest.fail("not all were made")
    monkeypatch.undo()

    assert names(client) == THERE


def test_they_stay_if_they_shall(client: TestClient, server: ServerView) -> None:
    with make(server, keep=True) as made:
        pass

    assert names(client) == [*made, *THERE]


def test_a_task_of_that_name_is_left_as_it_is_even_with_the_same_bytes(
    client: TestClient, server: ServerView
) -> None:
    with make(server, count=2, keep=True):
        before = client.get("/admin/v1/tasks/bench-0002", headers=ADMIN).json()
    client.delete("/admin/v1/tasks/bench-0001", headers=ADMIN)

    with (
        pytest.raises(LoadTestError, match="bench-0002 already: pass another --name-prefix"),
        make(server),
    ):
        pytest.fail("the second name is taken")

    assert names(client) == ["bench-0002", *THERE]
    assert client.get("/admin/v1/tasks/bench-0002", headers=ADMIN).json() == before


def test_a_made_task_that_somebody_replaced_meanwhile_is_theirs(
    client: TestClient, server: ServerView
) -> None:
    base = client.get("/admin/v1/base", headers=ADMIN).json()
    with make(server) as made:
        theirs = random_prefix(base, 5, seed=99)
        client.put(f"/admin/v1/tasks/{made[1]}", content=theirs, headers=ADMIN)

    assert names(client) == [made[1], *THERE]


def test_what_can_not_be_removed_is_named(
    client: TestClient, server: ServerView, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LoadTestError, match=r"3 tasks .* bench-0001 to bench-0003"), make(server):
        monkeypatch.setattr(server, "_admin_key", "another")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_random_prefix_has_the_servers_number_format(client: TestClient, dtype: str) -> None:
    base = client.get("/admin/v1/base", headers=ADMIN).json() | {"dtype": dtype}

    prefix = decode(random_prefix(base, 16, seed=1), "sha256:")

    values = prefix.keys[0].float()
    assert str(prefix.keys[0].dtype) == f"torch.{dtype}"
    assert 0.01 < values.std().item() < 0.03
    assert prefix.manifest.base_model.fingerprint == base["base_model"]["fingerprint"]


def test_a_prefix_that_the_server_would_not_take_is_refused_before(client: TestClient) -> None:
    base = client.get("/admin/v1/base", headers=ADMIN).json()

    for length in (0, 17):
        with pytest.raises(
            BadLoad, match=f"--num-virtual-tokens {length}: the server takes 1 to 16"
        ):
            random_prefix(base, length, seed=0)


def test_without_an_admin_key_nothing_is_made(client: TestClient) -> None:
    with (
        ServerView(Origin.of("http://server"), None, None, client) as server,
        pytest.raises(BadLoad, match="no admin key: pass --admin-key or set PREFIXD_ADMIN_KEY"),
        make(server),
    ):
        pytest.fail("nothing can be made")
