"""Recorded decode steps give what a forward pass gives, whatever fills the graph; on the CPU a "graph" runs its function again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from server.types import SamplingParams
from tests.engine_harness import Harness, random_prefix
from tests.kernel_support import KERNEL_DEVICE, needs_gpu, needs_triton
from tests.tiny_models import tiny_model

pytestmark = needs_triton


@dataclass
class Rerun:
    """Records by keeping the function; `runs` counts replays."""

    num_recorded: int = 0
    num_replays: int = 0
    functions: list[Callable[[], None]] = field(default_factory=list)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replays += 1
            function()

        return replay


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 keys, so that short rows have several; the interpreter is slow."""
    from server.model import decode_graphs
    from server.model.attention import work_items

    monkeypatch.setattr(work_items, "CHUNK", 32)
    monkeypatch.setattr(decode_graphs, "CHUNK", 32)
    monkeypatch.setattr(decode_graphs, "_SHORT", 64)


def answers(
    recorder: Any, architecture: str, *, overlapped: bool = False
) -> tuple[Mapping[Any, list[int]], Harness]:
    """Rows of two tasks and of none come and go, so that graphs of 1, 2 and 4 rows are needed, and one samples."""
    harness = Harness(
        tiny_model(architecture, num_hidden_layers=2).to(KERNEL_DEVICE),
        num_blocks=20,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        attention="triton",
        recorder=recorder,
        overlapped=overlapped,
    )
    shared, other = random_prefix(harness.model, 37, 1), random_prefix(harness.model, 5, 2)
    greedy = [SamplingParams(max_tokens=count, temperature=0.0) for count in (2, 3, 5)]
    harness.add("a", [5, 6, 7], shared, greedy[0])
    harness.add("b", [9, 8], shared, greedy[2])
    harness.add("c", list(range(10, 80)), None, greedy[1])
    harness.add("d", [3] * 9, other, SamplingParams(max_tokens=3, temperature=1.0), seed=7)
    return harness.run(), harness


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    ("architecture", "overlapped"), [("qwen3", False), ("qwen3", True), ("gpt_oss", False)]
)
def test_replayed_steps_give_the_tokens_of_forward_passes(
    architecture: str, overlapped: bool
) -> None:
    """gpt_oss has windows in every other layer, hence two kinds of tables, and sinks."""
    recorder = Rerun()

    replayed, harness = answers(recorder, architecture, overlapped=overlapped)

    assert recorder.num_replays >= 4
    assert replayed == answers(None, architecture)[0]
    assert {key: len(tokens) for key, tokens in replayed.items()} == {
        ("a", 0): 2,
        ("b", 0): 5,
        ("c", 0): 3,
        ("d", 0): 3,
    }
    for layer in harness.kv_cache.layers:
        assert not layer.keys[:16].any(), "rows that fill a graph wrote into the null block"


def test_shapes_grow_with_rows_and_then_with_length() -> None:
    from server.model.decode_graphs import GraphShape, graph_shapes

    assert graph_shapes(1, 500, 16) == [GraphShape(1, 500)]
    assert graph_shapes(2, 1500, 16) == [
        GraphShape(1, 1024),
        GraphShape(1, 1500),
        GraphShape(2, 1024),
        GraphShape(2, 1500),
    ]
    shapes = graph_shapes(200, 4096, 16)
    assert sorted({shape.num_rows for shape in shapes}) == [1, 2, 4, 8, *range(16, 200, 16), 200]
    assert {shape.kv_len for shape in shapes} == {1024, 4096}


def test_many_rows_with_very_long_contexts_have_no_graph_and_few_do() -> None:
    """Their tables would be megabytes to copy in each step."""
    from server.model.decode_graphs import graph_shapes

    shapes = graph_shapes(256, 131_072, 16)

    longest = {
        count: max(s.kv_len for s in shapes if s.num_rows == count) for count in (1, 32, 256)
    }
    assert longest == {1: 131_072, 32: 131_072, 256: 16_384}
    assert all(shape.tables(16).buffer_len <= 2**19 for shape in shapes)
    assert all(shape.tables(16).num_parts <= 8192 for shape in shapes)


@pytest.mark.usefixtures("short_chunks")
def test_a_step_takes_the_least_graph_that_holds_it() -> None:
    from server.model.decode_graphs import DecodeGraphs, GraphShape

    harness = Harness(
        tiny_model("llama", num_hidden_layers=1).to(KERNEL_DEVICE),
        num_blocks=30,
        max_num_seqs=2,
        attention="triton",
        recorder=Rerun(),
    )
    graphs = harness.runner.recorded
    assert isinstance(graphs, DecodeGraphs)
    used = []
    graphs._replays = {shape: lambda shape=shape: used.append(shape) for shape in graphs._replays}  # type: ignore[misc] # the shape is bound here and now
    harness.add("short", [1, 2, 3], None, SamplingParams(max_tokens=2, temperature=0.0))
    harness.run()
    harness.add("long", [1] * 200, None, SamplingParams(max_tokens=2, temperature=0.0))
    harness.run()

    assert used == [GraphShape(1, 64), GraphShape(1, 256)]


def test_a_step_with_a_prompt_has_no_graph() -> None:
    harness = Harness(
        tiny_model("llama", num_hidden_layers=1).to(KERNEL_DEVICE),
        num_blocks=10,
        max_num_seqs=2,
        attention="triton",
        recorder=(recorder := Rerun()),
    )
    harness.add("a", [1, 2, 3], None, SamplingParams(max_tokens=1, temperature=0.0))
    harness.run()

    assert recorder.num_recorded == 2
    assert recorder.num_replays == 0


@needs_gpu
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "gpt_oss"])
def test_on_a_gpu_captured_graphs_give_the_tokens_of_forward_passes(architecture: str) -> None:
    from server.model.decode_graphs import CudaRecorder

    assert torch.cuda.is_available()
    expected = answers(None, architecture)[0]
    assert answers(CudaRecorder(), architecture)[0] == expected
    assert answers(CudaRecorder(), architecture, overlapped=True)[0] == expected
