"""The benchmark of a CUDA machine, as far as a CPU shows it: its workload, its arithmetic, its stages' fates."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

from benchmarks import gpu
from benchmarks.gpu_report import GpuReport, StageResult
from benchmarks.gpu_shapes import (
    GPU_SIZES,
    LLAMA_8B,
    QWEN3_06B,
    QWEN25_15B,
    TARGETS,
    Figure,
    ModelShape,
    nano_workload,
    tiny,
)
from benchmarks.report import Machine

CEILINGS = (
    Figure("ceilings", "copy", 4.0, "TB/s"),
    Figure("ceilings", "read", 3.8, "TB/s"),
    Figure("ceilings", "multiply", 800.0, "TFLOP/s"),
)


def report(*results: StageResult) -> GpuReport:
    machine = Machine("2026-01-01", "cpu", 2, 2, 1.0, {"torch": "2"}, "abc")
    return GpuReport("python -m benchmarks.gpu", machine, "a GPU", results)


def test_nano_vllms_workload_is_theirs_token_for_token() -> None:
    """Their README's totals; another order of drawing gives others."""
    work = nano_workload(256, 1024)

    assert sum(len(w.prompt_token_ids) for w in work) == 142_827
    assert sum(w.output_len for w in work) == 133_966


@pytest.mark.parametrize(
    ("shape", "kv_bytes"), [(LLAMA_8B, 131_072), (QWEN3_06B, 114_688), (QWEN25_15B, 28_672)]
)
def test_shapes_have_the_kv_of_the_published_models(shape: ModelShape, kv_bytes: int) -> None:
    assert shape.kv_bytes_per_token() == kv_bytes
    assert shape.head_dim == 128
    small = tiny(shape)
    assert (
        small.num_query_heads // small.num_kv_heads == shape.num_query_heads // shape.num_kv_heads
    )


def test_a_time_is_held_against_the_limit_of_its_run() -> None:
    step = Figure("steps", "step Llama-3.1-8B B=1", 5.0, "ms", least_bytes=16e9)
    shown = report(StageResult("ceilings", CEILINGS, 1.0), StageResult("steps-8b", (step,), 1.0))

    assert shown.share(step) == pytest.approx(4 / 5)  # 16 GB at the better 4 TB/s are 4 ms
    assert step.target == 4.4
    assert step.met is False
    assert replace(step, value=4.3).met is True
    assert report(StageResult("steps-8b", (step,), 1.0)).share(step) is None, "nothing measured"


def test_ratios_are_met_from_below_and_copied_to_the_ratios() -> None:
    name = "step grouped Llama-3.1-8B P=2048 B=256 T=8"
    figure = Figure("steps", name, 2.1, "x")

    assert figure.met is True
    assert replace(figure, value=1.9).met is False
    assert report(StageResult("s", (figure,), 1.0)).figures()["ratios"] == {name: 2.1}


def test_every_target_is_one_of_a_figure_that_a_stage_gives() -> None:
    """A target whose name no figure has would never be seen to be missed."""
    shapes, sizes = (LLAMA_8B, QWEN3_06B, QWEN25_15B), GPU_SIZES
    given = {f"step {s.name} B={b}" for s in shapes for b in sizes.step_batches}
    given |= {
        f"step grouped {s.name} P={p} B={b} T={t}"
        for s in shapes
        for p, b, t in sizes.grouped_cases
    }
    given |= {f"nano-vllm {s.name}" for s in shapes} | {"64 tasks against 1, P=32"}
    given |= {f"vs_hf_continuous {s.name}" for s in shapes}

    assert set(TARGETS) <= given


def test_a_line_that_was_cut_off_is_no_figure() -> None:
    whole = "FIGURE " + json.dumps(CEILINGS[0].as_dict()) + "\n"

    assert gpu.read_figures(f"noise\n{whole}{whole[:30]}") == (CEILINGS[0],)
    assert gpu.read_figures(whole + whole.rstrip("\n")) == (CEILINGS[0],)


def test_a_failed_stage_leaves_the_others_and_says_so() -> None:
    failed = StageResult("steps-8b", CEILINGS[:1], 3.0, "exit 1: RuntimeError: no")
    shown = report(failed, StageResult("nano", CEILINGS[1:2], 1.0))

    assert "steps-8b: 1 figures in 3 s, FAILED: exit 1: RuntimeError: no" in shown.text()
    assert "steps-8b: 1 figures" in shown.markdown()
    assert shown.figures()["stages"]["steps-8b"]["error"] == "exit 1: RuntimeError: no"
    assert len(shown.figures()["figures"]) == 2


def test_a_kernel_that_gives_nan_costs_nobody_the_report() -> None:
    broken = Figure("correctness", "plain", float("nan"), "relative error")
    shown = report(StageResult("correctness", (broken,), 1.0))

    assert gpu.read_figures("FIGURE " + json.dumps(broken.as_dict()) + "\n")[0].name == "plain"
    json.dumps(shown.figures(), allow_nan=False)
    assert "nan" in shown.text()


def test_all_stages_together_fit_nine_minutes_or_are_cut_to_it() -> None:
    arguments = gpu.parse_arguments([])

    assert arguments.seconds <= 540
    late = gpu.run_stage("ceilings", argparse.Namespace(), limit_seconds=2)
    assert late.error == "no time was left for it"
