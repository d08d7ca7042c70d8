"""What serving T tasks costs with each method: 32 requests at once, spread evenly, in one process with all cores.

* **prefixes, and soft prompts**, which are prefixes once baked: prefixd's engine, all requests in one batch, the prefixes
  resident, as the adapters and models of the others are in memory;
* **LoRA**: PEFT's `generate(adapter_names=...)`, all requests in one batch; each layer takes the rows of one adapter after
  the other;
* **full fine-tuning**: T models in memory, each answers its own requests in a batch, one model after another.

The tensors of each task are random, of the shapes that the trained ones have: a multiplication takes as long whatever the
numbers are, and so every task has its own. Prompts are random tokens of one length and nobody stops early, so that all give
the same number of tokens. Main thread; called by `methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.contest import Call, Contestant, Result, Rules, compete
from benchmarks.methods_peers import LORA_ALPHA, LORA_RANK, adapted
from benchmarks.methods_plan import Grid
from benchmarks.peft_contestants import generate
from benchmarks.prefixd_contestant import Prefixd
from benchmarks.workload import Request, TaskPrefix, Workload

PROMPT_LEN: Final = 32
KINDS: Final = ("prefix", "lora", "full")
"""Contestants, in the order of `measure`'s figures; a prefix stands for all three methods that end as one."""
_KV_CACHE_BYTES: Final = 2**26
_WARM_UP_LEN: Final = 4


class LoraMixed:
    """All requests in one `generate`, each row with its task's adapter."""

    name: Final = "lora"
    description: Final = "PEFT, one batch, adapter_names for each row"

    def __init__(self, model_dir: Path, tasks: Sequence[str]) -> None:
        self._model = adapted(_endless(model_dir), _lora(), seed=0)
        for number, task in enumerate(tasks):
            self._model.add_adapter(task, _lora())
            _randomize(self._model, f".{task}.", number)
        self._model.eval()
        named = [(name, p) for name, p in self._model.named_parameters() if "lora_" in name]
        self.num_bytes = sum(p.nbytes for name, p in named if ".default." not in name)

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        return [tuple(requests)]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        names = [request.task for request in requests]
        return generate(self._model, requests, output_len, adapter_names=names)

    def close(self) -> None:
        """Nothing runs between calls."""


class OwnModels:
    """A fully fine-tuned model for each task; its requests are one `generate`."""

    name: Final = "full"
    description: Final = "transformers, a model a task, one model after another"

    def __init__(self, model_dir: Path, tasks: Sequence[str]) -> None:
        self._models = {task: _endless(model_dir) for task in tasks}
        for number, model in enumerate(self._models.values()):
            _randomize(model, "", number, size=1e-3)
        self.num_bytes = sum(p.nbytes for m in self._models.values() for p in m.parameters())

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """In the order in which the tasks' first requests arrived."""
        tasks = dict.fromkeys(request.task for request in requests)
        return [tuple(r for r in requests if r.task == task) for task in tasks]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        return generate(self._models[requests[0].task], requests, output_len)

    def close(self) -> None:
        """Nothing runs between calls."""


def _endless(model_dir: Path) -> Any:
    """The base in its own dtype, which never stops at an end of text."""
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype="auto").eval()
    model.generation_config.eos_token_id = None
    model.requires_grad_(False)
    return model


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules="all-linear",
        inference_mode=True,
    )


def _randomize(model: Any, part: str, seed: int, size: float = 0.1) -> None:
    """Adds normal numbers to the parameters with `part` in their names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter += torch.randn(parameter.shape, generator=generator) * size


def _prefixes(model_dir: Path, workload: Workload) -> list[TaskPrefix]:
    """A random prefix for each task, in the shape of the base's keys and values."""
    config: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype="auto").config
    shape = (workload.num_virtual_tokens, config.num_key_value_heads, config.head_dim)
    prefixes = []
    for number, task in enumerate(workload.tasks()):
        generator = torch.Generator().manual_seed(number)
        tensors = [
            torch.randn(shape, generator=generator) for _ in range(2 * config.num_hidden_layers)
        ]
        half = config.num_hidden_layers
        prefixes.append(TaskPrefix(task, tuple(tensors[:half]), tuple(tensors[half:])))
    return prefixes


def measure(model_dir: Path, grid: Grid, progress: Callable[[str], None]) -> dict[str, Any]:
    """Figures by number of tasks, then by kind: tokens/s (median, and of each round), TTFT, bytes that the tasks take."""
    found: dict[str, Any] = {}
    with TemporaryDirectory(prefix="prefixd-methods-") as directory:
        base_dir = Path(directory) / "model"
        _write_float32(model_dir, base_dir)
        for num_tasks in grid.serving_tasks:
            workload = Workload(
                num_tasks=num_tasks,
                requests_per_task=grid.serving_requests // num_tasks,
                num_virtual_tokens=grid.serving_virtual_tokens,
                prompt_len=PROMPT_LEN,
                output_len=grid.serving_tokens,
            )
            progress(f"serving {num_tasks} tasks")
            found[str(num_tasks)] = _measure(base_dir, workload, grid.serving_rounds, progress)
    return found


def _write_float32(source: Path, target: Path) -> None:
    """Everybody serves in the dtype that was trained in."""
    AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(str(source)).save_pretrained(target)


def _measure(
    model_dir: Path, workload: Workload, num_rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    with ExitStack() as stack:
        store = stack.enter_context(TemporaryDirectory(prefix="prefixd-methods-store-"))
        prefixes = _prefixes(model_dir, workload)
        prefixd = Prefixd(
            model_dir, Path(store), prefixes, kv_cache_bytes=_KV_CACHE_BYTES, cold=False
        )
        stack.callback(prefixd.close)
        lora = LoraMixed(model_dir, workload.tasks())
        own = OwnModels(model_dir, workload.tasks())
        contestants: list[Contestant] = [prefixd, lora, own]
        rules = Rules(
            repeats=num_rounds,
            round_seconds=0.0,
            quiet_cores=float("inf"),
            output_len=workload.output_len,
            warm_up_len=_WARM_UP_LEN,
        )
        vocab_size = own_vocabulary(model_dir)
        results = compete(contestants, workload.requests(vocab_size), rules, progress, lambda: None)
    prefix_bytes = sum(t.nbytes for p in prefixes for t in (*p.keys, *p.values))
    sizes = (prefix_bytes, lora.num_bytes, own.num_bytes)
    return {
        kind: _figures(result, size)
        for kind, result, size in zip(KINDS, results, sizes, strict=True)
    }


def own_vocabulary(model_dir: Path) -> int:
    """Token ids that a prompt may have."""
    size: int = len(AutoTokenizer.from_pretrained(str(model_dir)))
    return size


def _figures(result: Result, num_bytes: int) -> dict[str, Any]:
    return {
        "description": result.description,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_second_by_round": [r.tokens_per_second for r in result.rounds],
        "ttft_median_seconds": result.ttft_median,
        "task_bytes": num_bytes,
        "num_calls": result.rounds[0].calls_per_pass,
        "other_cores_by_round": [r.other_cores for r in result.rounds],
    }
