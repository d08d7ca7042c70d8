"""The second promise as an experiment: does a request give the same bits whatever happens around it?

A pool of requests runs once alone: each with all blocks it may want, nothing cached, and its whole prompt in one step.
A trial then runs 2 to 32 of them together, arriving at random, in another pool, with other chunks and other block sizes,
so that some are preempted and computed again, half of the time with steps that overlap, and mostly with the prompt cache, so that many read what another has
computed: prompts begin alike, and some requests come twice. Every token and every logit must be what it was alone.
`test_independence.py` does a few hundred trials; `make independence` runs this file for a thousand, with as many threads as it is told.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from prefix_store.artifact import Prefix
from server.engine.messages import ScheduledRow
from server.model.loader import adopt_model
from server.types import SamplingParams
from tests.engine_harness import Harness, random_prefix
from tests.tiny_models import VOCAB, tiny_model

# Wide enough that a product of one row sums in another order than one of several.
_WIDE: Final = {"hidden_size": 192, "intermediate_size": 3072, "num_hidden_layers": 2}
MODELS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", {"num_hidden_layers": 2}),
    "wide": ("llama", _WIDE),
    "gpt2": ("gpt2", {"n_layer": 2}),
    "mistral": ("mistral", {"num_hidden_layers": 2}),
}
_PREFIX_LENGTHS: Final = (1, 7, 37, 130)
_POOL: Final = 36
_AGAIN: Final = "+"  # ends the name of a request that came a second time
# A token is known by its request and its place in the answer.
Bits = Mapping[tuple[str, int], Tensor]


@dataclass(frozen=True)
class Job:
    """One request of the pool, always the same."""

    name: str
    prompt: list[int]
    prefix: Prefix | None
    sampling: SamplingParams


@dataclass
class Recorder(Harness):
    """A harness that keeps the logits of every sampled token."""

    logits: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        forward = self.runner.forward

        def recorded(rows: tuple[ScheduledRow, ...]) -> Tensor:
            logits = forward(rows)
            for row, value in zip((r for r in rows if r.sample), logits, strict=True):
                seq = row.sequence
                self.logits[seq.request.request_id, len(seq.output_token_ids)] = value.clone()
            return logits

        self.runner.forward = recorded  # type: ignore[method-assign] # listens in


@dataclass
class Laboratory:
    """One model in one dtype, its pool of requests, and what each gives alone."""

    model: str
    dtype: torch.dtype
    num_preemptions: int = 0
    num_requests: int = 0
    num_hit_tokens: int = 0

    def __post_init__(self) -> None:
        architecture, overrides = MODELS[self.model]
        self.module: nn.Module = tiny_model(architecture, **overrides).to(self.dtype)
        loaded = adopt_model(self.module, model_id="tiny")
        rng = random.Random(self.model)
        prefixes = [random_prefix(loaded, n, seed=n) for n in _PREFIX_LENGTHS]
        self._beginning = [rng.randrange(3, VOCAB) for _ in range(90)]
        self.jobs = [self._job(i, rng, prefixes) for i in range(_POOL)]
        self.alone: dict[tuple[str, int], Tensor] = {}
        for job in self.jobs:
            recorder = Recorder(
                self.module,
                merged=True,
                prepacked=True,
                prompt_cache=False,
                max_num_batched_tokens=512,
            )
            recorder.add(job.name, job.prompt, job.prefix, job.sampling, seed=len(job.prompt))
            recorder.run()
            self.alone |= recorder.logits

    def _job(self, index: int, rng: random.Random, prefixes: list[Prefix]) -> Job:
        sampling = SamplingParams(
            max_tokens=rng.choice((1, 12, 30, 30)),
            temperature=rng.choice((0.0, 0.0, 0.8)),
            ignore_eos=True,
        )
        length = rng.choice((1, 2, 5, 17, 90))
        own = [rng.randrange(3, VOCAB) for _ in range(length)]
        prompt = (self._beginning[: rng.choice((0, 16, 48, 90))] + own)[:length]
        return Job(f"r{index}", prompt, rng.choice([*prefixes, None]), sampling)

    def trial(self, seed: int) -> str | None:
        """What differed, or nothing."""
        rng = random.Random(seed)
        jobs = rng.sample(self.jobs, rng.randint(2, 32))
        block_size = rng.choice((2, 2, 4, 16))
        # The longest request alone needs 130 + 90 + 30 tokens, and the ends of two blocks.
        tight = 250 // block_size + 4 + rng.randrange(100 // block_size)
        budget = rng.choice((32, 33, 48, 100, 512))
        recorder = Recorder(
            self.module,
            merged=True,
            prepacked=True,
            prompt_cache=rng.random() < 0.8,
            overlapped=rng.random() < 0.5,
            num_blocks=rng.choice((tight, tight, tight, 4000 // block_size)),
            block_size=block_size,
            max_num_seqs=min(budget, rng.choice((3, 32, 32))),
            max_num_batched_tokens=budget,
        )
        again = [replace(job, name=job.name + _AGAIN) for job in rng.sample(jobs, len(jobs) // 4)]
        for job in (*jobs, *again):
            recorder.add(job.name, job.prompt, job.prefix, job.sampling, seed=len(job.prompt))
            for _ in range(rng.choice((0, 0, 0, 0, 0, 4))):
                recorder.step()
        recorder.run(max_steps=5000)
        self.num_preemptions += recorder.num_preemptions
        self.num_requests += len(jobs) + len(again)
        self.num_hit_tokens += recorder.num_hit_tokens
        return self._difference(recorder.logits, [*jobs, *again])

    def _difference(self, found: Bits, jobs: list[Job]) -> str | None:
        """The first token whose logits are not those of its request alone. Equal logits give equal tokens."""
        for job in jobs:
            for place in range(job.sampling.max_tokens):
                ours = found.get((job.name, place))
                alone = self.alone[job.name.removesuffix(_AGAIN), place]
                if ours is None:
                    return f"{job.name} has no token {place}"
                if not torch.equal(ours, alone):
                    off = float((ours - alone).abs().max())
                    return f"{job.name}, token {place}: logits differ by {off:.2g}"
        return None


def main() -> int:
    """Runs the trials on each model and dtype in turn; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    laboratories = [Laboratory(m, d) for m in MODELS for d in (torch.float32, torch.bfloat16)]
    faults = 0
    for number in range(options.trials):
        laboratory = laboratories[number % len(laboratories)]
        if (fault := laboratory.trial(options.seed + number)) is not None:
            faults += 1
            print(f"trial {options.seed + number}, {laboratory.model} {laboratory.dtype}: {fault}")
    requests = sum(lab.num_requests for lab in laboratories)
    preempted = sum(lab.num_preemptions for lab in laboratories)
    hits = sum(lab.num_hit_tokens for lab in laboratories)
    print(
        f"{options.trials} trials, {requests} requests, {preempted} preemptions, {hits} cached tokens, "
        f"{torch.get_num_threads()} threads: {faults} trials with a difference"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
