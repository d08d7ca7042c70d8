"""The comparison end to end at its smallest, and the arithmetic that turns calls into figures."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine_load, peft_comparison
from benchmarks.contest import Call, Result, Round, Rules, agreement, percentile
from benchmarks.hardware_limits import HardwareLimits, ModelCost
from benchmarks.peft_contestants import PeftGenerate, load_peft_model
from benchmarks.workload import (
    SCALES,
    Request,
    Workload,
    bake_prefixes,
    text_prefixes,
    write_model,
)

TINY = SCALES["tiny"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any], str]:
    """Lines printed, the figures in the last one, and the markdown report."""
    out = tmp_path_factory.mktemp("reports") / "new" / "report.md"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        peft_comparison.main(
            ["--scale", "tiny", "--dtype", "float32", "--repeats", "2", "--out", str(out)]
        )
    lines = printed.getvalue().splitlines()
    return lines, json.loads(lines[-1]), out.read_text()


def test_all_contestants_give_the_same_tokens_in_float32(run: Any) -> None:
    _, figures, _ = run

    assert len(figures["agreement"]) == 10, "every two contestants are compared"
    for agreed in figures["agreement"].values():
        assert agreed["num_requests"] == TINY.workload.num_requests
        assert agreed["identical_share"] == 1.0
        assert agreed["num_distinct"] == TINY.workload.num_requests


def test_the_last_line_holds_every_figure_that_a_report_needs(run: Any) -> None:
    _, figures, _ = run

    peers = ("peft_single", "peft_batched", "hf_static", "hf_continuous")
    assert figures["ratios"].keys() == {f"vs_{peer}" for peer in peers}
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert {"cpu", "cores", "threads", "versions", "commit", "date"} <= figures["machine"].keys()
    assert figures["limits"]["read_bytes_per_second"] > 0
    for contestant in figures["contestants"].values():
        assert contestant["tokens_per_second"] > 0
        assert 0 < contestant["ttft_median_seconds"] <= contestant["ttft_p95_seconds"]
        assert contestant["share_measured"] == 1.0
        assert contestant["ttft_alone_seconds"] > 0
        assert len(contestant["load_average_by_round"]) == 2


def test_the_report_holds_the_table_that_was_printed(run: Any) -> None:
    lines, figures, report = run

    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 7
    assert "\n".join(table) in report
    assert figures["command"] in report
    assert figures["machine"]["commit"] in report


def test_a_report_that_exists_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.md"
    old.write_text("a record")

    with pytest.raises(SystemExit):
        peft_comparison.main(["--scale", "tiny", "--out", str(old)])

    assert old.read_text() == "a record"
    assert "choose a new name" in capsys.readouterr().err


def test_the_prefix_decides_what_peft_answers(tmp_path: Path) -> None:
    """Else equal tokens would say nothing about prefixes."""
    write_model(tmp_path, TINY, torch.float32)
    prefixes = bake_prefixes(tmp_path, text_prefixes(TINY))
    model = load_peft_model(tmp_path, prefixes, attention="sdpa")
    contestant = PeftGenerate(model, "peft", "", group=1)
    request = TINY.workload.requests(TINY.config["vocab_size"])[0]

    answers = {
        contestant.serve((replace(request, task=prefix.task),), output_len=8).tokens
        for prefix in prefixes
    }

    assert len(answers) == len(prefixes)


def test_calls_hold_requests_of_one_task_in_order_of_arrival() -> None:
    requests = Workload(3, 4, 1, 1, 1).requests(9)
    single = PeftGenerate(None, "", "", group=1).calls(requests)
    pairs = PeftGenerate(None, "", "", group=2).calls(requests)

    assert [[r.index for r in call] for call in single] == [[i] for i in range(12)]
    assert [[r.index for r in call] for call in pairs] == [
        [0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11],
    ]  # fmt: skip


def _call(index: int, seconds: float, first: float) -> Call:
    return Call((Request(index, "t", (1,)),), ((7, 8),), (first,), seconds, ())


def test_a_pass_cut_short_is_continued_with_the_calls_measured() -> None:
    calls = (_call(0, 2.0, 0.5), _call(1, 4.0, 1.0))
    done = Round(calls, 5, lone_first_token_seconds=0.1, load_average=0.0, other_cores=0.0)

    assert not done.is_full_pass
    assert done.pass_seconds == 2 + 4 + 2 + 4 + 2
    assert done.tokens_per_second == 10 / 14
    assert done.ttft_seconds() == [0.5, 3.0, 6.5, 9.0, 12.5]


def _round(other_cores: float) -> Round:
    return Round((_call(0, 1.0, 0.5),), 1, 0.1, load_average=0.0, other_cores=other_cores)


def test_disturbed_rounds_are_tried_again_and_the_quietest_count() -> None:
    rules = Rules(repeats=2, round_seconds=0, quiet_cores=0.2, output_len=1, warm_up_len=1)
    result = Result("peer", "")
    for others in (0.1, 1.5, 0.9):
        assert not result.has_enough(rules)
        result.add(_round(others))
    result.add(_round(0.0))
    assert result.has_enough(rules)

    result.keep_quietest(2)

    assert [r.other_cores for r in result.rounds] == [0.1, 0.0]
    assert result.num_tried == 4


def test_a_machine_that_is_never_quiet_does_not_hold_the_run_up_for_ever() -> None:
    rules = Rules(repeats=2, round_seconds=0, quiet_cores=0.2, output_len=1, warm_up_len=1)
    result = Result("peer", "", [_round(1.0)] * 6, num_tried=6)

    assert result.has_enough(rules)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(range(1, 33), 0.95) == 31
    assert percentile([5.0], 0.95) == 5.0


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    found = agreement({0: (1, 2, 3), 1: (4, 5, 6), 2: (9,)}, {0: (1, 2, 3), 1: (4, 0, 6)})

    assert (found.num_requests, found.num_distinct) == (2, 2)
    assert found.identical_share == 0.5
    assert found.prefix_share == 4 / 6


def test_the_limit_of_a_step_is_reading_for_few_rows_and_multiplying_for_many() -> None:
    limits = HardwareLimits(read_bytes_per_second=10.0, flops_per_second=100.0)
    cost = ModelCost(num_params=60, weight_bytes=100, multiplied_params=50, kv_bytes_per_token=1)

    assert cost.step_seconds(limits, num_rows=1, kv_tokens=0) == 10.0
    assert cost.step_seconds(limits, num_rows=20, kv_tokens=5) == 20.5


def test_an_embedding_that_is_only_looked_up_costs_no_multiplication() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    embedding = TINY.config["vocab_size"] * TINY.config["hidden_size"]
    costs = []
    for tied in (True, False):
        config = AutoConfig.for_model("qwen2", **TINY.config | {"tie_word_embeddings": tied})
        costs.append(ModelCost.of(AutoModelForCausalLM.from_config(config), 1))

    assert costs[0].multiplied_params == costs[0].num_params == costs[1].multiplied_params
    assert costs[1].num_params == costs[0].num_params + embedding


def test_our_own_work_is_not_counted_as_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            machine_load, "_busy_seconds", time.process_time
        )  # a machine with only us on it
        meter = machine_load.OthersMeter()
        _keep_busy(0.2)
        assert meter.cores() < 0.01
    meter = machine_load.OthersMeter()
    _keep_busy(0.2)
    assert 0.0 <= meter.cores() <= (os.cpu_count() or 1) + 0.1  # ticks of 10 ms


def test_the_work_of_processes_that_we_started_is_our_own_while_they_live_and_after() -> None:
    program = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    before = machine_load._own_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        living = machine_load._own_seconds()
        child.communicate("\n")
    ended = machine_load._own_seconds()

    assert 0.28 <= living - before < 30.0  # ticks of 10 ms
    assert 0.28 <= ended - before < 30.0


def _keep_busy(seconds: float) -> None:
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        pass
