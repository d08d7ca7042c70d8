"""Random histories of the engine without a model, and the proof that they would show a bug."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.planted_bugs import PLANTED_BUGS
from tests.simulation.world import run_episode

NUM_BATCHES = 8
EPISODES_PER_BATCH = 40
# Everything that must have happened somewhere, else the simulation proves less than it seems to.
MUST_HAPPEN = [
    "abort while waiting",
    "abort while waiting_for_prefix",
    "abort while running",
    "abort while preempted",
    "preemption",
    "eviction",
    "prefix load",
    "reload",
    "load failed",
    "cache hit",
    "cache hit up to the last block",
    "cache hit in an answer",
    "found again after a preemption",
    "blocks dropped",
    "preempted with a token to come",
    "ended with a row under way",
    "ended by the step under way",
    "row failed",
    "step failed",
    "refused for pins",
    "pin refused",
    "finished: stop",
    "finished: length",
    "finished: abort",
    "finished: error",
]


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_every_promise_holds_in_random_histories(batch: int) -> None:
    """The seed of a failure is in its note; `World(seed)` brings it back."""
    for seed in range(batch * EPISODES_PER_BATCH, (batch + 1) * EPISODES_PER_BATCH):
        run_episode(seed)


def test_the_histories_reach_every_state_and_fault() -> None:
    seen = Counter[str]()
    for seed in range(60):
        seen += run_episode(seed).seen

    assert [name for name in MUST_HAPPEN if seen[name] < 3] == []


def test_the_same_seed_gives_the_same_history() -> None:
    for seed in range(20):
        assert run_episode(seed) == run_episode(seed)
    assert len({run_episode(seed).trace for seed in range(20)}) == 20


@pytest.mark.parametrize("name", PLANTED_BUGS)
def test_planted_bugs_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that can not fail proves nothing: each of these was a bug of some server."""
    PLANTED_BUGS[name](monkeypatch)

    for seed in range(EPISODES_PER_BATCH * NUM_BATCHES):
        try:
            run_episode(seed)
        except TypeError:
            raise  # the plant does not fit the method that it replaces, and proves nothing
        except Exception:  # noqa: BLE001 - a planted bug may break anything
            return
    pytest.fail(f"{name}: no history showed it")
