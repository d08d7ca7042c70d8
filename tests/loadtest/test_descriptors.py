"""The limit on open descriptors is raised as far as it goes, and named where it does not suffice."""

from __future__ import annotations

import resource

import pytest

from loadtest.descriptors import ENOUGH, RESERVED, max_open_streams
from loadtest.errors import BadLoad


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The limits of this process, pretended; the last entry is in force."""
    found = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: found[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: found.append(limit))
    return found


def test_the_soft_limit_rises_to_the_hard_one(limits: list[tuple[int, int]]) -> None:
    assert max_open_streams(None) == 4096 - RESERVED
    assert limits[-1] == (4096, 4096)


def test_no_more_is_asked_for_than_is_wanted(limits: list[tuple[int, int]]) -> None:
    assert max_open_streams(2000) == 2000
    assert limits[-1] == (2000 + RESERVED, 4096)


def test_a_limit_that_suffices_is_left_alone(limits: list[tuple[int, int]]) -> None:
    assert max_open_streams(500) == 500
    assert limits == [(1024, 4096)]


def test_without_a_limit_ports_are_the_limit(limits: list[tuple[int, int]]) -> None:
    limits.append((resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    assert max_open_streams(None) == ENOUGH


def test_more_than_descriptors_allow_is_refused_with_the_number(
    limits: list[tuple[int, int]],
) -> None:
    with pytest.raises(BadLoad, match=r"--max-open 5000: .* 4096 descriptors .* leaves 4032"):
        max_open_streams(5000)
    limits.append((50, 50))
    with pytest.raises(BadLoad, match="50 descriptors"):
        max_open_streams(None)
