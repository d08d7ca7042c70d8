"""The store as a caller sees it: whatever it is asked by name, a hidden task is an unknown one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from prefix_store.errors import InvalidTaskName, UnknownTask
from prefix_store.store import PrefixStore
from server.http.caller import NOBODY
from server.http.visible_store import VisibleStore
from tests.prefix_store.builders import make_artifact
from tests.server.http.fakes import store_with_tasks

ARGUMENTS = {"number": 1, "weight": 0.5, "tenant": "gamma"}
NAMED = sorted(
    name
    for name, method in inspect.getmembers(VisibleStore, inspect.isfunction)
    if not name.startswith("_")
    and {"name", "task", "ref"} & set(inspect.signature(method).parameters)
)
ONLY_SUGGESTS = "similar"


@pytest.fixture(scope="module")
def store() -> PrefixStore:
    store = store_with_tasks()
    store.put("acme~hidden", make_artifact(seed=5))
    store.put("acme~shared", make_artifact(seed=6))
    store.grant("acme~shared", "beta")
    return store


def call(view: VisibleStore, method: str, name: str) -> Callable[[], Any]:
    """The call of a method with `name` for the task, and with something for the rest that it must have."""
    bound = getattr(view, method)
    rest = list(inspect.signature(bound).parameters.values())[1:]
    needed = [ARGUMENTS[p.name] for p in rest if p.default is inspect.Parameter.empty]
    return lambda: bound(name, *needed)


def test_every_method_that_takes_a_name_is_tried_here() -> None:
    assert {"full_name", "task", "resolve", "delete", "promote", "grant"} < set(NAMED)
    assert len(NAMED) >= 12


@pytest.mark.parametrize("method", [name for name in NAMED if name != ONLY_SUGGESTS])
@pytest.mark.parametrize("name", ["acme~hidden", "acme~shared", "acme~absent", "hidden", "poet"])
def test_what_belongs_to_another_is_unknown_to_every_method(
    store: PrefixStore, method: str, name: str
) -> None:
    before = repr(store.tasks())
    view = VisibleStore(store).seen_by("beta", granted=False)
    full = name if "~" in name else f"beta~{name}"
    if method == "full_name" and name != full:
        assert view.full_name(name) == full  # as it would be called, if it were there
    elif method == "check_preconditions" and name != full:
        call(view, method, name)()  # it may be made
    else:
        with pytest.raises(UnknownTask, match=f"^there is no task '{full}'$"):
            call(view, method, name)()
    assert repr(store.tasks()) == before


def test_what_was_granted_can_be_read_for_inference_and_changed_by_nobody_else(
    store: PrefixStore,
) -> None:
    view = VisibleStore(store).seen_by("beta", granted=True)

    assert view.resolve("acme~shared").task == "acme~shared"
    assert [info.name for info in view.tasks()] == ["acme~shared"]
    for method in ("delete", "rollback", "grant", "promote", "check_preconditions"):
        with pytest.raises(AssertionError):
            call(view, method, "acme~shared")()


def test_nobody_sees_nothing(store: PrefixStore) -> None:
    view = VisibleStore(store).seen_by(NOBODY.tenant, granted=True)

    assert view.tasks() == []
    assert view.similar("poet") == []
    for name in ("poet", "acme~hidden", "~poet"):
        with pytest.raises((UnknownTask, InvalidTaskName)):
            view.task(name)


def test_whoever_sees_everything_names_everything_in_full(store: PrefixStore) -> None:
    view = VisibleStore(store)

    assert view.sees_all
    assert len(view.tasks()) == 4
    assert view.task("acme~hidden").name == "acme~hidden"
    assert view.shown_name("acme~hidden") == "acme~hidden"
    assert view.seen_by("acme", granted=False).shown_name("acme~hidden") == "hidden"
    assert view.seen_by("", granted=True).shown_name("poet") == "poet"
    assert view.evictable(["sha256:a"]) == ["sha256:a"]
