"""A run ends with its evaluation in folder and report, and hands its prefix over if that was asked for."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live_server import ADMIN, ADMIN_KEY, LiveServer, live_server
from tests.trainer.demo_data import write_jsonl
from trainer.__main__ import main
from trainer.judgement import EVALUATION, result_tables

TASK = "record-qa"


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The command takes signals over; the test runner wants them back."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "examples.jsonl", TASK, 40)


def train(data: Path, run: Path, *flags: str) -> int:
    given = ["--data", str(data), "--output", str(run), "--num-steps", "3", "--num-threads", "1"]
    with pytest.raises(SystemExit) as caught:
        main(["train", *given, "--num-virtual-tokens", "4", "--batch-size", "4", *flags])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_a_run_ends_with_an_evaluation_beside_the_baselines(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "run", "--metric", "exact_match", "--evaluate", "3") == 0

    found = json.loads((tmp_path / "run" / EVALUATION).read_text())
    assert found["num_examples"] == 3
    assert set(found["conditions"]) >= {"prefix", "no_prefix"}
    assert "3 held-out examples" in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text()
    [table] = result_tables(tmp_path / "run")
    assert table.title in page
    assert "scores in percent, loss in nats a token; ± is one standard error" in page
    assert [row[0] for row in table.rows] == ["exact_match", "loss", "perplexity"]


def test_a_run_need_not_be_judged(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "run", "--evaluate", "0") == 0
    assert not (tmp_path / "run" / EVALUATION).exists()
    assert result_tables(tmp_path / "run") == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"conditions": 1}'])
def test_an_evaluation_that_can_not_be_read_is_left_out_of_the_report(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / EVALUATION).write_text(text)
    assert result_tables(tmp_path) == ()


def test_a_run_can_be_selected_by_what_its_prefix_generates(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "run", "--select-by", "token_f1", "--evaluate", "0") == 0
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"token_f1"' in log


PUSH = ["--push", "http://127.0.0.1:1", "--promote-if", "exact_match >= 3"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--push", "http://127.0.0.1:1"], "--push and --promote-if together"),
        (["--promote-if", "bleu >= 3"], "--push and --promote-if together"),
        (["--push", "http://127.0.0.1:1", "--promote-if", "better"], "better"),
        (["--metric", "beauty"], "beauty"),
        (["--evaluate", "-1"], "--evaluate: expected 0 or more"),
        ([*PUSH, "--task", "No Task", "--admin-key", "k"], "task name"),
        (PUSH, "no admin key"),
        ([*PUSH, "--task", "t", "--admin-key", "k"], "can not reach http://127.0.0.1:1"),
    ],
)
def test_what_can_not_follow_a_run_is_refused_before_it(
    data: Path, tmp_path: Path, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "run", *flags) in (1, 2)
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("server")
    with live_server(folder, "--store", str(folder / "store")) as running:
        yield running


def test_a_run_hands_its_prefix_over_and_the_rule_decides(
    data: Path, tmp_path: Path, server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def hand_over(run: str, rule: str) -> Any:
        flags = [
            "--push",
            server.url,
            "--admin-key",
            ADMIN_KEY,
            "--task",
            "qa",
            "--promote-if",
            rule,
        ]
        code = train(data, tmp_path / run, "--evaluate", "0", "--seed", str(len(run)), *flags)
        with server.client() as client:
            info = client.get("/admin/v1/tasks/qa", headers=ADMIN).json()
        return code, info["live"], info["num_versions"], capsys.readouterr().out

    code, live, count, out = hand_over("first", "exact_match >= 0")
    assert (code, live, count) == (0, 1, 1)
    assert "qa@v1 promoted" in out

    code, live, count, out = hand_over("another", "exact_match >= live + 50")
    assert (code, live, count) == (3, 1, 2)
    assert "qa@v2 not promoted" in out
