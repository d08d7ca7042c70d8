"""Compiled layers: how many graphs there are, when they run, and that a server never breaks on them.

Most tests trace the layers and run the graphs as they are, which takes the compiler's place in a second. One really
compiles.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from server.errors import ConfigError
from server.model.attention import make_attention_backend
from server.model.compiled_layers import compile_layers
from server.model.loader import LoadedModel, adopt_model
from server.model.merged_linear import merge_linears
from server.model.prepacked_linear import prepack
from server.model.self_check import self_check
from server.types import SamplingParams
from tests.engine_harness import Harness, random_prefix
from tests.tiny_models import tiny_model

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


class Traced:
    """Stands for the compiler: keeps each graph, counts its runs."""

    def __init__(self, factor: float = 1.0) -> None:
        self.num_graphs = 0
        self.num_runs = 0
        self._factor = factor

    def __call__(self, graph: nn.Module, _: list[Any]) -> Any:
        self.num_graphs += 1

        def run(*inputs: Any) -> Any:
            self.num_runs += 1
            return [x * self._factor for x in graph(*inputs)]

        return run


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    """All models of a process share what is compiled of one function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def as_served(architecture: str, **overrides: Any) -> LoadedModel:
    module = tiny_model(architecture, **overrides)
    return prepack(merge_linears(adopt_model(module, model_id="tiny")))


def drive(harness: Harness, num_requests: int = 6) -> dict[tuple[str, int], list[int]]:
    """Tokens of requests that arrive one by one, so that packs of many sizes run."""
    prefixes = [random_prefix(harness.model, n, seed=n) for n in (5, 37)]
    for i in range(num_requests):
        prompt = [(7 * i + 3 * t) % 190 + 3 for t in range(1 + 9 * i)]
        harness.add(str(i), prompt, [None, *prefixes][i % 3], GREEDY)
        harness.step()
    return dict(harness.run())


@pytest.mark.parametrize(
    ("architecture", "num_kinds"),
    [("llama", 1), ("qwen3", 1), ("gemma2", 2), ("gpt2", 1), ("opt", 1)],
)
def test_layers_of_a_kind_share_one_graph_which_serves_every_batch(
    architecture: str, num_kinds: int
) -> None:
    plain = Harness(tiny_model(architecture), merged=True, prepacked=True)
    expected, traced = drive(plain), Traced()

    harness = Harness(tiny_model(architecture), merged=True, prepacked=True, compiled=traced)

    assert traced.num_graphs == num_kinds
    num_runs, passes = traced.num_runs, []
    harness.module.register_forward_hook(lambda *_: passes.append(1))
    assert drive(harness) == expected
    assert traced.num_graphs == num_kinds, "a batch was compiled for"
    assert traced.num_runs - num_runs == len(passes) * harness.model.layout.num_layers


@pytest.mark.slow
@pytest.mark.timeout(1200)  # most of it is the compiler's; a busy machine takes minutes
@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning"
)  # torch's compiler uses it itself
def test_what_the_compiler_makes_gives_the_tokens_of_the_uncompiled_layers() -> None:
    """In float32, where the compiler's fewer roundings are too small to decide between two tokens."""
    expected = drive(Harness(tiny_model("llama"), merged=True, prepacked=True))

    harness = Harness(tiny_model("llama"), merged=True, prepacked=True, compiled="inductor")

    layers = harness.module.model.layers  # type: ignore[union-attr]
    assert all("forward" in vars(layer) for layer in layers), "nothing was compiled"  # type: ignore[union-attr]
    assert drive(harness) == expected


def test_a_graph_serves_the_engine_thread_and_other_attention() -> None:
    traced = Traced()
    model = compile_layers(as_served("llama"), backend=traced)
    num_runs = traced.num_runs
    checked: list[float] = []

    thread = threading.Thread(
        target=lambda: checked.append(self_check(model, make_attention_backend("auto")))
    )
    thread.start()
    thread.join()

    assert checked[0] < 1e-4
    # Three packed steps; transformers' own attention, with its cache, runs uncompiled.
    assert traced.num_runs - num_runs == 3 * model.layout.num_layers
    assert traced.num_graphs == 1


def test_a_token_alone_is_padded_to_two() -> None:
    plain = adopt_model(tiny_model("llama"), model_id="tiny")
    traced = Traced()

    model = compile_layers(plain, backend=traced)

    assert plain.pack_shape.padded(1) == 1
    assert model.pack_shape.padded(1) == 2


def test_layers_that_can_not_be_compiled_are_served_uncompiled_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(graph: nn.Module, inputs: list[Any]) -> Any:
        raise RuntimeError("no such operator")

    model = as_served("llama")

    with caplog.at_level(logging.WARNING):
        assert compile_layers(model, backend=broken) is model
    assert "no such operator" in caplog.text
    assert "stay uncompiled" in caplog.text
    assert self_check(model, make_attention_backend("auto")) < 1e-4


def test_layers_whose_results_change_are_served_uncompiled_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, wrong = as_served("llama"), Traced(factor=1.1)

    with caplog.at_level(logging.WARNING):
        assert compile_layers(model, backend=wrong) is model
    assert "results differ" in caplog.text
    num_runs = wrong.num_runs
    assert self_check(model, make_attention_backend("auto")) < 1e-4
    assert wrong.num_runs == num_runs > 0


def test_without_a_compiler_the_server_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)

    with pytest.raises(ConfigError, match=r"--compile needs a C\+\+ compiler"):
        compile_layers(as_served("llama"))
