"""What `methods` runs: the grid of methods, tasks, seeds, sizes and lengths, and what it will cost. Pure.

A `Run` is one training: its key names a folder, so equal runs of two stages are made once. The learning rates of all
stages but the first come from the first, which looks at validation items only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from demo.build.tasks import TASKS

Method = Literal["direct", "mlp", "prompt", "lora", "full"]
Stage = Literal["tune", "compare", "low-data", "lengths", "serving", "report"]

METHODS: Final[tuple[Method, ...]] = get_args(Method)
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)
NAMES: Final[Mapping[Method, str]] = {
    "direct": "prefix, direct",
    "mlp": "prefix, MLP",
    "prompt": "prompt tuning",
    "lora": "LoRA",
    "full": "full fine-tuning",
}
PREFIXES: Final[tuple[Method, ...]] = ("direct", "mlp")
BEHIND_PREFIX: Final[tuple[Method, ...]] = ("direct", "mlp", "prompt")
"""Methods that put virtual tokens before a request and leave the base alone."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training and its judgement. `num_virtual_tokens`: 0 for methods that have none."""

    method: Method
    task: str
    learning_rate: float
    seed: int
    num_training: int
    num_steps: int
    num_virtual_tokens: int

    @property
    def key(self) -> str:
        return (
            f"{self.method}_{self.task}_lr{self.learning_rate:g}_p{self.num_virtual_tokens}"
            f"_n{self.num_training}_steps{self.num_steps}_seed{self.seed}"
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A run, and on how many test items it is judged: 0 while learning rates are chosen."""

    run: Run
    num_test: int

    @property
    def key(self) -> str:
        return self.run.key


@dataclass(frozen=True, slots=True)
class Grid:
    """Everything that is varied. `steps` and `num_virtual_tokens`: by task. `rates`: what is tried for each method.

    `cost_task`: the one whose time and memory of training are shown.
    """

    tasks: Sequence[str]
    tune_tasks: Sequence[str]
    cost_task: str
    low_data_task: str
    length_tasks: Sequence[str]
    rates: Mapping[Method, Sequence[float]]
    seeds: Sequence[int]
    low_data_methods: Sequence[Method]
    low_data_sizes: Sequence[int]
    lengths: Sequence[int]
    length_seeds: Sequence[int]
    steps: Mapping[str, int]
    num_training: int
    num_validation: int
    num_test: int
    num_virtual_tokens: Mapping[str, int]
    serving_virtual_tokens: int
    serving_tasks: Sequence[int]
    serving_requests: int
    serving_tokens: int
    serving_rounds: int

    def run(
        self,
        method: Method,
        task: str,
        rate: float,
        seed: int,
        *,
        size: int | None = None,
        length: int | None = None,
    ) -> Run:
        """With the grid's own data size and prefix length where none is given."""
        count = length or self.num_virtual_tokens[task]
        return Run(
            method=method,
            task=task,
            learning_rate=rate,
            seed=seed,
            num_training=size or self.num_training,
            num_steps=self.steps[task],
            num_virtual_tokens=count if method in BEHIND_PREFIX else 0,
        )

    def tune(self) -> list[Job]:
        """Every rate of every method, on each of the tuning tasks with one seed."""
        return [
            Job(self.run(method, task, rate, self.seeds[0]), 0)
            for task in self.tune_tasks
            for method in METHODS
            for rate in self.rates[method]
        ]

    def compare(self, rates: Mapping[Method, float]) -> list[Job]:
        """Seed by seed, so that a benchmark that is cut short has whole rows."""
        return [
            Job(self.run(method, task, rates[method], seed), self.num_test)
            for seed in self.seeds
            for task in self.tasks
            for method in METHODS
        ]

    def low_data(self, rates: Mapping[Method, float]) -> list[Job]:
        """The largest size is the comparison's own."""
        return [
            Job(self.run(method, self.low_data_task, rates[method], seed, size=n), self.num_test)
            for seed in self.seeds
            for n in (*self.low_data_sizes, self.num_training)
            for method in self.low_data_methods
        ]

    def length(self, rates: Mapping[Method, float]) -> list[Job]:
        """Direct prefixes; the grid's own length is the comparison's."""
        return [
            Job(self.run("direct", task, rates["direct"], seed, length=count), self.num_test)
            for seed in self.length_seeds
            for task in self.length_tasks
            for count in self.lengths
        ]

    def jobs(self, stage: Stage, rates: Mapping[Method, float]) -> list[Job]:
        """The trainings of a stage; none for those that train nothing. `rates` are not read by `tune`."""
        match stage:
            case "tune":
                return self.tune()
            case "compare":
                return self.compare(rates)
            case "low-data":
                return self.low_data(rates)
            case "lengths":
                return self.length(rates)
            case "serving" | "report":
                return []


FULL: Final = Grid(
    tasks=tuple(TASKS),
    tune_tasks=("record-to-sentence", "record-qa"),
    cost_task="record-to-sentence",
    low_data_task="record-to-sentence",
    length_tasks=("record-to-sentence", "casual-rewrite"),
    rates={
        "direct": (2e-2, 5e-2, 1e-1),
        "mlp": (2e-3, 5e-3, 1e-2),
        "prompt": (1e-2, 5e-2, 2e-1),
        "lora": (1e-3, 3e-3, 1e-2),
        "full": (2e-4, 5e-4, 1e-3),
    },
    seeds=(0, 1, 2),
    low_data_methods=("direct", "lora", "full"),
    low_data_sizes=(50, 200, 500),
    lengths=(1, 2, 4, 8, 16, 32),
    length_seeds=(0,),
    steps={name: task.steps for name, task in TASKS.items()},
    num_training=2_000,
    num_validation=100,
    num_test=500,
    num_virtual_tokens={name: task.num_virtual_tokens for name, task in TASKS.items()},
    serving_virtual_tokens=16,
    serving_tasks=(1, 8, 32),
    serving_requests=32,
    serving_tokens=32,
    serving_rounds=3,
)

SMALL: Final = Grid(
    tasks=("sentiment",),
    tune_tasks=("sentiment", "record-qa"),
    cost_task="sentiment",
    low_data_task="sentiment",
    length_tasks=("sentiment",),
    rates={
        "direct": (5e-2, 1e-1),
        "mlp": (5e-3,),
        "prompt": (5e-2,),
        "lora": (3e-3,),
        "full": (5e-4,),
    },
    seeds=(0, 1),
    low_data_methods=("direct", "full"),
    low_data_sizes=(8,),
    lengths=(2, 4),
    length_seeds=(0,),
    steps={"sentiment": 4, "record-qa": 4},
    num_training=32,
    num_validation=4,
    num_test=8,
    num_virtual_tokens={"sentiment": 4, "record-qa": 4},
    serving_virtual_tokens=4,
    serving_tasks=(1, 2),
    serving_requests=4,
    serving_tokens=4,
    serving_rounds=1,
)

_STEP_SECONDS: Final[Mapping[str, float]] = {
    "record-to-sentence": 0.132,
    "sentence-to-record": 0.146,
    "casual-rewrite": 0.177,
    "sentiment": 0.075,
    "record-qa": 0.130,
}
"""Of a direct prefix of 16 tokens, measured in 16 steps each, as the factors were."""
_FACTORS: Final[Mapping[Method, float]] = {
    "direct": 1.0,
    "mlp": 1.0,
    "prompt": 1.18,
    "lora": 1.33,
    "full": 1.31,
}
_FIXED_SECONDS: Final = 5.0  # the base loaded, held-out losses, the artifact
_ITEM_SECONDS: Final = 0.01


def expected_seconds(job: Job) -> float:
    """Of one thread on a quiet core of the machine that the figures above were measured on."""
    run = job.run
    step = _STEP_SECONDS[run.task] * _FACTORS[run.method]
    return _FIXED_SECONDS + run.num_steps * step + job.num_test * _ITEM_SECONDS


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each run once, with the most test items that any job of it asks for; in order of first appearance."""
    found: dict[str, Job] = {}
    for job in jobs:
        known = found.get(job.key)
        if known is None or known.num_test < job.num_test:
            found[job.key] = job
    return list(found.values())
