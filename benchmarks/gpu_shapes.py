"""What `gpu.py` measures: model shapes, sizes of the workloads, the figures that are aimed at, and one figure.

Pure: nothing here needs a GPU. Shapes are those of the published configs; weights are random, which changes no
time. `CPU_SIZES` and the tiny shapes are for seeing that every stage runs, not for figures.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of `model_type` with this `config`."""

    name: str
    model_type: str
    config: dict[str, Any]

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def num_query_heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def num_kv_heads(self) -> int:
        return int(self.config["num_key_value_heads"])

    @property
    def head_dim(self) -> int:
        own = self.config.get("head_dim")
        return int(own or self.config["hidden_size"] // self.num_query_heads)

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


_NO_SPECIAL_TOKENS: Final = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_ROPE_1M: Final = {"rope_type": "default", "rope_theta": 1_000_000.0}

LLAMA_8B: Final = ModelShape(
    "Llama-3.1-8B",
    "llama",
    _NO_SPECIAL_TOKENS
    | {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
)
QWEN3_06B: Final = ModelShape(
    "Qwen3-0.6B",
    "qwen3",
    _NO_SPECIAL_TOKENS
    | {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": _ROPE_1M,
    },
)
QWEN25_15B: Final = ModelShape(
    "Qwen2.5-1.5B",
    "qwen2",
    _NO_SPECIAL_TOKENS
    | {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "rope_parameters": _ROPE_1M,
    },
)


def tiny(shape: ModelShape) -> ModelShape:
    """The same kind of model with little in it; odd numbers of heads stay odd."""
    group = shape.num_query_heads // shape.num_kv_heads
    small = {
        "vocab_size": 512,
        "hidden_size": 32 * group,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2 * group,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return ModelShape(f"tiny {shape.name}", shape.model_type, shape.config | small)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. `kernel_cases`: rows and own tokens; `grouped_cases`: prefix, rows, tasks."""

    step_batches: tuple[int, ...]
    context_len: int
    kernel_cases: tuple[tuple[int, int], ...]
    grouped_cases: tuple[tuple[int, int, int], ...]
    cold_prefixes: tuple[int, ...]
    num_nano_requests: int
    max_nano_len: int
    num_peer_requests: int
    peer_prompt_len: int
    peer_output_len: int
    repeats: int
    copy_bytes: int
    matrix_size: int


GPU_SIZES: Final = Sizes(
    step_batches=(1, 8, 64, 256),
    context_len=640,
    kernel_cases=((32, 1024), (64, 2048), (256, 1024)),
    grouped_cases=((2048, 256, 8), (2048, 64, 1), (128, 256, 8), (128, 64, 64), (16, 64, 64)),
    cold_prefixes=(128, 2048),
    num_nano_requests=256,
    max_nano_len=1024,
    num_peer_requests=64,
    peer_prompt_len=128,
    peer_output_len=64,
    repeats=20,
    copy_bytes=2**32,
    matrix_size=8192,
)
CPU_SIZES: Final = Sizes(
    step_batches=(1, 3),
    context_len=20,
    kernel_cases=((2, 20),),
    grouped_cases=((40, 4, 2),),
    cold_prefixes=(5,),
    num_nano_requests=3,
    max_nano_len=110,
    num_peer_requests=2,
    peer_prompt_len=9,
    peer_output_len=4,
    repeats=2,
    copy_bytes=2**22,
    matrix_size=128,
)

# What is aimed at on an H200, by the name of the figure: milliseconds at most, ratios and the rest at least.
TARGETS: Final = {
    **{
        f"step Llama-3.1-8B B={b}": t
        for b, t in zip((1, 8, 64, 256), (4.4, 4.6, 6.3, 14.1), strict=True)
    },
    **{
        f"step Qwen3-0.6B B={b}": t
        for b, t in zip((1, 8, 64, 256), (1.2, 1.3, 2.3, 6.8), strict=True)
    },
    **{f"step Qwen2.5-1.5B B={b}": t for b, t in zip((1, 64, 256), (1.5, 1.9, 3.4), strict=True)},
    "nano-vllm Qwen3-0.6B": 22_000.0,
    "step grouped Llama-3.1-8B P=2048 B=256 T=8": 2.0,
    "step grouped Qwen3-0.6B P=2048 B=256 T=8": 2.8,
    "64 tasks against 1, P=32": 0.97,
    "vs_hf_continuous Llama-3.1-8B": 3.0,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. `least_bytes` and `least_flops`: what the machine must move and multiply for it.

    Times are in ms, rates in their unit, ratios above 1 mean that prefixd (or grouping) is faster.
    """

    stage: str
    name: str
    value: float
    unit: str
    least_bytes: float = 0.0
    least_flops: float = 0.0
    note: str = ""

    def share_of(self, bytes_per_second: float, flops_per_second: float) -> float | None:
        """Of the measured limit: the least time over the time taken. None where nothing is to be moved."""
        least = self.least_bytes / bytes_per_second + self.least_flops / flops_per_second
        return least * 1000 / self.value if self.unit == "ms" and least and self.value else None

    @property
    def target(self) -> float | None:
        return TARGETS.get(self.name)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.unit == "ms" else self.value >= self.target

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NanoRequest:
    """A request of nano-vllm's own benchmark."""

    prompt_token_ids: tuple[int, ...]
    output_len: int


def nano_workload(num_requests: int, max_len: int) -> list[NanoRequest]:
    """nano-vllm's `bench.py`: lengths U[100, max_len], seed 0, drawn in its order.

    At 256 requests of at most 1,024 tokens: 142,827 tokens in, 133,966 out.
    """
    draw = random.Random(0)
    prompts = [
        tuple(draw.randint(0, 10_000) for _ in range(draw.randint(100, max_len)))
        for _ in range(num_requests)
    ]
    return [NanoRequest(prompt, draw.randint(100, max_len)) for prompt in prompts]
