"""What the real server acknowledged outlives a SIGKILL; `make kill-loop` asks it 2,000 times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.kill_loop import run

KINDS = (
    "upload", "upload to shared", "refused", "promote", "rollback", "set canary", "end canary", "delete",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(
    900
)  # 80 seconds on a quiet core; one that others use too may take five times as long
def test_a_killed_server_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    result = run(tmp_path, cycles=200)

    assert (result.lost, result.altered, result.invalid) == ([], [], [])
    assert result.cycles == 200
    # Too little load would prove nothing.
    assert [kind for kind in KINDS if result.kinds[kind] < 10] == []
    assert result.acknowledged == result.audit_records > 5 * result.cycles
    assert min(result.under_way_done, result.under_way_not_done, result.kills_during_start) > 5
    assert result.versions_read > 1000
    assert result.generations > 10


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["acknowledged_before_it_is_written", "named_before_it_is_there"])
def test_the_kill_loop_notices_a_store_that_breaks_its_promise(tmp_path: Path, bug: str) -> None:
    result = run(tmp_path, cycles=100, planted_bug=bug)

    assert result.lost
