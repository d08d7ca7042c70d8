"""What every contestant is given: the model, the tasks' prefixes, the requests. All of it made from a seed.

A task's prefix is there twice: as a text of random tokens, and as the keys and values that the model itself computes
for that text. So a peer that knows no prefixes is given the text before each prompt, attends over the very same
keys and values, and must give the same tokens.

Nothing is downloaded. The model has the shape of a published one and random weights, which changes no time:
a multiplication takes as long whatever the numbers are. It is written to a directory, so that everybody
loads it as a user would.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_tasks` tasks with `requests_per_task` requests each, all of which arrive at once."""

    num_tasks: int
    requests_per_task: int
    num_virtual_tokens: int
    prompt_len: int
    output_len: int
    seed: int = 0

    @property
    def num_requests(self) -> int:
        return self.num_tasks * self.requests_per_task

    @property
    def num_output_tokens(self) -> int:
        return self.num_requests * self.output_len

    def tasks(self) -> tuple[str, ...]:
        return tuple(f"task-{i}" for i in range(self.num_tasks))

    def requests(self, vocab_size: int) -> tuple[Request, ...]:
        """In order of arrival: the tasks take turns, as users of a shared server would."""
        draw = random.Random(self.seed)
        tasks = self.tasks()
        return tuple(
            Request(
                index=i,
                task=tasks[i % len(tasks)],
                prompt_token_ids=tuple(draw.randrange(vocab_size) for _ in range(self.prompt_len)),
            )
            for i in range(self.num_requests)
        )

    def describe(self) -> str:
        return (
            f"{self.num_tasks} tasks x {self.requests_per_task} requests at t=0, "
            f"prefix {self.num_virtual_tokens}, {self.prompt_len} prompt + {self.output_len} output "
            "tokens, greedy, end of text ignored"
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for one task."""

    index: int
    task: str
    prompt_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TaskPrefix:
    """A task's K/V: per layer [P, H_kv, D], in the model's dtype. `text`: the P tokens that gave them, if any did."""

    task: str
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    text: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scale:
    """A model shape with a workload for it; `kv_cache_bytes` is prefixd's pool, ample for the workload."""

    name: str
    config: dict[str, Any]
    workload: Workload
    kv_cache_bytes: int


_QWEN2: Final[dict[str, Any]] = {
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "bos_token_id": None,
    "eos_token_id": None,  # nobody stops early, and nobody pays for a processor that forbids it
    "pad_token_id": None,
    "use_sliding_window": False,
}

SCALES: Final = {
    "0.5b": Scale(
        name="Qwen2.5-0.5B shape",
        config=_QWEN2
        | {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "max_position_embeddings": 32_768,
        },
        workload=Workload(
            num_tasks=8, requests_per_task=4, num_virtual_tokens=32, prompt_len=64, output_len=64
        ),
        kv_cache_bytes=2**29,
    ),
    "small": Scale(
        name="small Qwen2 shape",  # to see that it works, with heads that everybody has kernels for
        config=_QWEN2
        | {
            "vocab_size": 2048,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "max_position_embeddings": 1024,
            "initializer_range": 0.06,
        },
        workload=Workload(
            num_tasks=3, requests_per_task=2, num_virtual_tokens=32, prompt_len=16, output_len=12
        ),
        kv_cache_bytes=2**26,
    ),
    "tiny": Scale(
        name="tiny Qwen2 shape",
        config=_QWEN2
        | {
            "vocab_size": 512,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            "max_position_embeddings": 512,
            "initializer_range": 0.12,  # at 0.02 such a small model repeats its last token for ever
        },
        workload=Workload(
            num_tasks=3, requests_per_task=2, num_virtual_tokens=7, prompt_len=9, output_len=12
        ),
        kv_cache_bytes=2**21,
    ),
}


def write_model(directory: Path, scale: Scale, dtype: torch.dtype, seed: int = 0) -> None:
    """Writes a random-weight model and a tokenizer of its vocabulary, as `--model DIR` takes them."""
    config = AutoConfig.for_model("qwen2", **scale.config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(str(directory))
    make_tokenizer(scale.config["vocab_size"]).save_pretrained(str(directory))


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose every id has a text, so that detokenizing costs what it costs in earnest."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"{'aeiou'[i % 5]}{i:x}" for i in range(vocab_size))
    vocab = {token: i for i, token in zip(range(vocab_size), [*alphabet, *words], strict=False)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def text_prefixes(scale: Scale) -> dict[str, tuple[int, ...]]:
    """A text of `num_virtual_tokens` random tokens for each task."""
    draw = random.Random(1000 + scale.workload.seed)
    vocab_size, length = scale.config["vocab_size"], scale.workload.num_virtual_tokens
    return {
        task: tuple(draw.randrange(vocab_size) for _ in range(length))
        for task in scale.workload.tasks()
    }


def bake_prefixes(model_dir: Path, texts: Mapping[str, tuple[int, ...]]) -> list[TaskPrefix]:
    """Each text's keys and values, computed by transformers with the model in `model_dir`."""
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype="auto").eval()
    prefixes = []
    for task, text in texts.items():
        with torch.inference_mode():
            cache = model(torch.tensor([text]), use_cache=True, logits_to_keep=1).past_key_values
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # each [H_kv, P, D]
        prefixes.append(
            TaskPrefix(
                task,
                keys=tuple(keys.transpose(0, 1).contiguous() for keys, _ in layers),
                values=tuple(values.transpose(0, 1).contiguous() for _, values in layers),
                text=text,
            )
        )
    return prefixes


def random_prefixes(scale: Scale, dtype: torch.dtype, tasks: Iterable[str]) -> Iterator[TaskPrefix]:
    """Keys and values that stand for no text, one prefix at a time: for more tasks than one would bake."""
    config = scale.config
    heads = config["num_key_value_heads"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    shape = (2, config["num_hidden_layers"], scale.workload.num_virtual_tokens, heads, head_dim)
    for number, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(1000 + number)
        keys, values = torch.randn(shape, generator=generator).to(dtype)
        yield TaskPrefix(task, tuple(keys), tuple(values))


def save_prefix(directory: Path, prefix: TaskPrefix) -> None:
    """Writes keys and values to a file named for the task, for another process of this run."""
    tensors = {f"k.{i}": t for i, t in enumerate(prefix.keys)}
    tensors |= {f"v.{i}": t for i, t in enumerate(prefix.values)}
    save_file(tensors, directory / f"{prefix.task}.safetensors")


def load_prefix(directory: Path, task: str) -> TaskPrefix:
    """What `save_prefix` wrote."""
    tensors = load_file(directory / f"{task}.safetensors")
    layers = range(len(tensors) // 2)
    return TaskPrefix(
        task, tuple(tensors[f"k.{i}"] for i in layers), tuple(tensors[f"v.{i}"] for i in layers)
    )
