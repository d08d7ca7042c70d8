"""The comparison with vLLM, end to end but for vLLM, whose place a fake program takes; and what a worker does."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vllm_comparison
from benchmarks.token_times import steady_gaps
from benchmarks.vllm_comparison import Case, cases, vllm_environment
from benchmarks.vllm_worker import OfflineEngine
from benchmarks.worker_protocol import Worker
from benchmarks.workload import SCALES
from tests.benchmarks.fake_vllm_worker import FakeLlm

FAKE = "tests.benchmarks.fake_vllm_worker"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    """The text printed, the figures in its last line, and the markdown report."""
    work = tmp_path_factory.mktemp("vllm")
    flags = ["--scale", "tiny", "--dtype", "float32", "--repeats", "1", "--threads", "1"]
    flags += ["--vllm-python", sys.executable, "--vllm-module", FAKE]
    flags += ["--work", str(work), "--out", str(work / "report.md")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        vllm_comparison.main(flags)
    printed_text = printed.getvalue()
    figures = json.loads(printed_text.splitlines()[-1])
    return printed_text, figures, (work / "report.md").read_text()


def test_every_contest_and_the_start_have_a_ratio(run: Any) -> None:
    _, figures, _ = run

    names = [case.name for case in cases(SCALES["tiny"])]
    assert names == [
        "1_requests_prefix_7", "2_requests_prefix_7", "6_requests_prefix_7", "2_requests_prefix_112"
    ]  # fmt: skip
    assert list(figures["ratios"]) == [
        *(f"vs_vllm_cpu_{name}" for name in names), "vs_vllm_cpu_start", "vs_vllm_cpu_start_cold"
    ]  # fmt: skip
    assert all(ratio > 0 for ratio in figures["ratios"].values())


def test_prefixd_and_the_peer_serve_the_same_requests(run: Any) -> None:
    _, figures, _ = run

    for case, contest in zip(cases(SCALES["tiny"]), figures["contests"].values(), strict=True):
        ours, theirs = contest["contestants"]["prefixd"], contest["contestants"]["vllm_cpu"]
        assert ours["rows_per_step"] == theirs["rows_per_step"] == case.num_requests
        assert ours["share_of_limit"] > 0
        assert contest["agreement"]["prefixd vllm_cpu"]["num_requests"] == case.num_requests


def test_the_report_says_who_took_part_and_how_they_started(run: Any) -> None:
    printed, figures, report = run

    for name in figures["contests"]:
        assert f"## {name}" in printed
        assert f"## {name}" in report
    assert "vLLM's vllm none" in report
    assert "from start to ready: vLLM with empty caches: " in report


def test_a_run_without_vllm_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vllm_comparison.main(["--vllm-python", "/nowhere/python"])

    assert "make bench-vllm" in capsys.readouterr().err


def test_a_worker_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    program = "import sys; sys.stdin.readline(); sys.exit('no such kernel')"
    with pytest.raises(RuntimeError, match=r"worker peer ended with status 1:\nno such kernel"):
        Worker("peer", [sys.executable, "-c", program], {}, tmp_path / "log")


def test_vllm_gets_texts_resident_and_prompts_new() -> None:
    llm = FakeLlm()
    engine = OfflineEngine(
        llm, lambda n: n, lambda ids: {"prompt_token_ids": ids}, {"a": [7, 8], "b": [9]}
    )
    asked = [{"task": "b", "prompt_token_ids": [3]}, {"task": "a", "prompt_token_ids": [5]}]

    for _ in range(2):
        answer = engine.serve({"requests": asked, "output_len": 4})

    assert llm.num_resets == 2
    assert llm.llm_engine.seen == [[7, 8], [9], [9, 3], [7, 8, 5]] * 2
    assert answer["tokens"] == [[4, 5, 6, 7], [6, 7, 8, 9]]
    assert 0 < answer["first_token_seconds"][0] < answer["first_token_seconds"][1]
    assert len(answer["decode_step_seconds"]) == 2, "three steps had both requests"


def test_gaps_are_taken_while_all_requests_decode() -> None:
    times = [[1.0, 2.0, 4.0, 7.0, 11.0], [2.0, 4.0, 7.0]]

    assert steady_gaps(times) == (2.0, 3.0)


def test_what_vllm_wants_preloaded_is_taken_from_its_own_environment(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()

    command = vllm_environment(tmp_path / "bin" / "python", tmp_path / "caches", threads=2)

    assert command[0] == "env"
    assert f"LD_PRELOAD={tmp_path}/lib/libiomp5.so" in command
    assert "OMP_NUM_THREADS=2" in command


def test_a_contest_is_named_for_what_is_asked() -> None:
    assert Case(8, 512).name == "8_requests_prefix_512"
    assert [(c.num_requests, c.num_virtual_tokens) for c in cases(SCALES["0.5b"])] == [
        (1, 32), (8, 32), (32, 32), (8, 512)
    ]  # fmt: skip
