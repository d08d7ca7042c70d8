"""What makes the comparison of methods fair: only the method differs, and whatever is judged or served is what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import demo
from benchmarks.contest import Call
from benchmarks.methods_peers import FullTrainee, LoraTrainee, PeerLoop, PromptTrainee
from benchmarks.methods_plan import FULL, SMALL, Job
from benchmarks.methods_serving import LoraMixed
from benchmarks.methods_training import Workplace, perform, read, settings
from benchmarks.workload import Workload
from demo.build.tasks import TASKS
from trainer.base import FrozenBase, load_base
from trainer.batches import Batch, make_batch
from trainer.initial import initial_prefix
from trainer.prefix_cache import KeyValues
from trainer.prefix_encoder import build_encoder
from trainer.session import gather

TASK = SMALL.tasks[0]


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return load_base(None, dtype="float32", device="cpu")


def example_batch(base: FrozenBase, tmp_path: Path) -> Batch:
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    run = SMALL.run("prompt", TASK, 5e-2, 0)
    place.of(run).mkdir(parents=True)
    material = gather(settings(run, place), base)
    return make_batch(material.training[:5], base.device)


def test_a_soft_prompt_in_every_row_is_the_keys_and_values_that_it_leaves(
    base: FrozenBase, tmp_path: Path
) -> None:
    batch = example_batch(base, tmp_path)
    trainee = PromptTrainee(base, TASKS[TASK].init_text, 4, seed=0)

    with torch.no_grad():
        torch.testing.assert_close(
            trainee.logits(batch), base.logits(trainee.prefix(), batch), atol=1e-4, rtol=0
        )
        bare = base.logits(None, batch)
        assert not torch.allclose(trainee.logits(batch), bare, atol=0.1)


def test_lora_begins_as_the_base_and_merged_answers_as_before(tmp_path: Path) -> None:
    base = load_base(None, dtype="float32", device="cpu")  # its own, which PEFT will change
    batch = example_batch(base, tmp_path)
    bare = base.logits(None, batch)
    trainee = LoraTrainee(base, seed=0)
    torch.testing.assert_close(trainee.logits(batch), bare, atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        adapted = trainee.logits(batch)
        trainee.finish()
        torch.testing.assert_close(base.logits(None, batch), adapted, atol=1e-4, rtol=0)
    assert not torch.allclose(adapted, bare, atol=0.01)


def test_the_peers_loop_takes_the_trainers_steps(tmp_path: Path) -> None:
    """A prefix trained by the peers' loop has the loss that `prefixd train` gives it."""
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    run = SMALL.run("direct", TASK, 5e-2, 1)
    perform(Job(run, 0), place)
    config = settings(run, place)
    material = gather(config)
    base = material.base
    encoder = build_encoder(base, config, initial_prefix(base, config, material.training))

    class Prefix:
        def __init__(self) -> None:
            self.parameters = dict(encoder.named_parameters())

        def logits(self, batch: Batch) -> torch.Tensor:
            return base.logits(encoder(), batch)

        def prefix(self) -> KeyValues:
            return encoder.rows().detached()

        def finish(self) -> Any:
            return base.module

    loop = PeerLoop(base, Prefix(), config, material.training, material.held_out)
    loop.run()

    trained = read(place.training_file(run))
    assert loop.best_step == trained["best_step"]
    assert loop.best_loss == pytest.approx(trained["held_out_loss"], rel=1e-4)


def test_a_loss_that_is_no_number_ends_a_peer_with_its_best_so_far(tmp_path: Path) -> None:
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    run = SMALL.run("full", TASK, 5e-4, 0)
    place.of(run).mkdir(parents=True)
    material = gather(settings(run, place))
    trainee = FullTrainee(material.base)
    before = {name: p.detach().clone() for name, p in trainee.parameters.items()}
    logits = trainee.logits

    class Broken(FullTrainee):
        def __init__(self) -> None:
            self.parameters = trainee.parameters

        def logits(self, batch: Batch) -> torch.Tensor:
            return logits(batch) * float("nan")

    loop = PeerLoop(
        material.base, Broken(), settings(run, place), material.training, material.held_out
    )
    loop.run()

    assert (loop.diverged_step, loop.best_step) == (1, 0)
    assert all(torch.equal(before[name], p) for name, p in trainee.parameters.items())


def test_few_examples_are_another_part_for_each_seed_and_all_are_the_same(tmp_path: Path) -> None:
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    texts = {}
    for seed in (0, 1):
        for method in ("direct", "full"):
            run = FULL.run(method, TASK, 1e-3, seed, size=8)
            place.of(run).mkdir(parents=True)
            texts[method, seed] = settings(run, place).data.read_text()

    assert texts["direct", 0] == texts["full", 0] != texts["direct", 1] == texts["full", 1]
    assert len(texts["direct", 0].splitlines()) == 8


def test_rows_of_one_batch_answer_each_with_its_own_adapter(tmp_path: Path) -> None:
    workload = Workload(2, 2, 4, 8, 6)
    lora = LoraMixed(demo.MODEL_DIR, workload.tasks())
    requests = workload.requests(2_000)
    same = tuple(replace(r, prompt_token_ids=requests[0].prompt_token_ids) for r in requests)
    [together] = [lora.serve(call, 6) for call in lora.calls(same)]

    def alone(index: int) -> Call:
        return lora.serve((same[index],), 6)

    assert together.tokens == tuple(alone(index).tokens[0] for index in range(4))
    assert len(set(together.tokens)) == 2, "an answer for each task"
