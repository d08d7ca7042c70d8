"""LoRA, prompt tuning (both PEFT) and full fine-tuning (transformers), trained as `trainer` trains a prefix.

Everything but what is trained is the trainer's own: the encoded examples and their order, the batches, the loss, the
schedule, clipping, AdamW's settings, ten evaluations and the best of them kept. Main thread of one process a run;
called by `methods_training`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from trainer.base import FrozenBase
from trainer.batches import Batch, DataOrder, make_batch
from trainer.config import DEFAULT_NUM_EVALUATIONS, TrainConfig
from trainer.encoding import EncodedExample
from trainer.held_out_loss import mean_loss
from trainer.initial import text_token_ids
from trainer.loop import ADAM_BETAS
from trainer.loss import next_token_loss
from trainer.prefix_cache import KeyValues
from trainer.schedule import Schedule

LORA_RANK: Final = 4
LORA_ALPHA: Final = 8


class Trainee(Protocol):
    """What is trained on a base. `prefix`: what stands before each row when it is judged, if anything."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...

    def logits(self, batch: Batch) -> Tensor:
        """[N, V] of the batch's targets, with gradients."""

    def prefix(self) -> KeyValues | None: ...

    def finish(self) -> Any:
        """The plain transformers model that answers as the trained one, behind `prefix`."""


class FullTrainee:
    """All weights of the base."""

    def __init__(self, base: FrozenBase) -> None:
        self._base = base
        base.module.requires_grad_(True)
        self.parameters: Mapping[str, nn.Parameter] = dict(base.module.named_parameters())

    def logits(self, batch: Batch) -> Tensor:
        return self._base.logits(None, batch)

    def prefix(self) -> None:
        """Nothing."""

    def finish(self) -> Any:
        return self._base.module.requires_grad_(False)


class LoraTrainee:
    """PEFT's adapters on all linear layers, which it puts into the base's own modules; merged when judged."""

    def __init__(self, base: FrozenBase, seed: int) -> None:
        self._base = base
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
        self._model = adapted(base.module, config, seed)
        self._model.eval()
        self.parameters = trainable(self._model)

    def logits(self, batch: Batch) -> Tensor:
        return self._base.logits(None, batch)

    def prefix(self) -> None:
        """Nothing."""

    def finish(self) -> Any:
        return self._model.merge_and_unload()


class PromptTrainee:
    """PEFT's soft prompt, begun as the same text's embeddings; judged as the keys and values that it leaves."""

    def __init__(self, base: FrozenBase, text: str, count: int, seed: int) -> None:
        self._base = base
        self._count = count
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count)
        self._model = adapted(base.module, config, seed)
        self._model.eval()
        self.parameters = trainable(self._model)
        [self._embeddings] = self.parameters.values()
        ids = torch.tensor(text_token_ids(base.tokenizer, text, count))
        self._embeddings.data.copy_(base.embeddings(ids))

    def logits(self, batch: Batch) -> Tensor:
        """PEFT feeds the prompt in every row; as in `FrozenBase.logits`, the output layer sees what predicts only."""

        def only_predicting(_: nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (hidden[0][batch.rows, batch.columns + self._count][None], *hidden[1:])

        handle = self._base.module.get_output_embeddings().register_forward_pre_hook(
            only_predicting
        )
        try:
            output = self._model(input_ids=batch.token_ids, use_cache=False)
        finally:
            handle.remove()
        logits: Tensor = output.logits
        return logits[0]

    @torch.no_grad()
    def prefix(self) -> KeyValues:
        """Exactly what every row would compute for the prompt."""
        return self._base.key_values(self._embeddings.detach())

    def finish(self) -> Any:
        return self._base.module


def adapted(module: Any, config: Any, seed: int) -> Any:
    """The PEFT model around `module`, its own random beginnings drawn by `seed`."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT asks whether gradients are checkpointed, by a name that transformers is about to drop.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(module, config)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, those that get a gradient."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass(slots=True)
class PeerLoop:
    """The trainer's loop around a `Trainee`. `step_seconds`: CPU time of the optimizer steps alone, without evaluations."""

    base: FrozenBase
    trainee: Trainee
    config: TrainConfig
    training: Sequence[EncodedExample]
    held_out: Sequence[EncodedExample]
    step_seconds: list[float] = field(default_factory=list)
    best_loss: float = math.inf
    best_step: int = 0
    diverged_step: int | None = None
    _best: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> None:
        """Trains; the best parameters are in the trainee then. Stops at a loss that is no number."""
        order = DataOrder(
            [example.num_tokens for example in self.training],
            self.config.batch_size,
            self.config.seed,
        )
        num_steps = self.config.num_steps_for(order.steps_per_epoch)
        warmup = math.ceil(self.config.warmup_fraction * num_steps)
        schedule = Schedule(self.config.peak_learning_rate, num_steps, warmup, self.config.schedule)
        optimizer = torch.optim.AdamW(
            self.trainee.parameters.values(),
            lr=schedule.peak,
            betas=ADAM_BETAS,
            weight_decay=self.config.weight_decay,
        )
        every = max(1, num_steps // DEFAULT_NUM_EVALUATIONS)
        self._evaluate(0)
        for step in range(num_steps):
            examples = [self.training[index] for index in order.indices(step)]
            if not self._step(optimizer, examples, schedule.learning_rate(step)):
                self.diverged_step = step + 1
                break
            if (step + 1) % every == 0 or step + 1 == num_steps:
                self._evaluate(step + 1)
        restore(self.trainee, self._best)

    def _step(
        self, optimizer: torch.optim.Optimizer, examples: Sequence[EncodedExample], rate: float
    ) -> bool:
        """One update; False, and nothing changed, if loss or gradient is no number."""
        started = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        batch = make_batch(examples, self.base.device)
        loss = next_token_loss(self.trainee.logits(batch), batch) / len(batch.targets)
        loss.backward()  # type: ignore[no-untyped-call] # torch has no types for it
        parameters = list(self.trainee.parameters.values())
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if not (math.isfinite(float(loss.detach())) and math.isfinite(norm)):
            return False
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        self.step_seconds.append(time.process_time() - started)
        return True

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """Keeps the parameters if the held-out loss is the lowest so far."""
        rows, prefix = self.config.batch_size, self.trainee.prefix()
        loss = mean_loss(self.base, prefix, self.held_out, rows, next_token_loss)
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self._best = state(self.trainee)


def state(trainee: Trainee) -> dict[str, Tensor]:
    """The trained tensors as they are, by name."""
    return {name: p.detach().clone() for name, p in trainee.parameters.items()}


def restore(trainee: Trainee, stored: Mapping[str, Tensor]) -> None:
    """Puts stored tensors back."""
    assert stored.keys() == trainee.parameters.keys(), "the tensors of another method"
    with torch.no_grad():
        for name, parameter in trainee.parameters.items():
            parameter.copy_(stored[name])
