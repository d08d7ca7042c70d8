"""The training loop: step, evaluate, keep the best, write checkpoints, stop when it is time.

Main thread; built and run by `session`. It tells its observers everything (`records`) and reads nothing back from
them. Between two steps its whole state is in `Progress`, the encoder, the optimizer and the best prefix, which is
what a checkpoint holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

import torch

from trainer.base import FrozenBase
from trainer.batches import DataOrder
from trainer.checkpoint import Checkpoint, Origin, Progress, save_checkpoint
from trainer.config import DEFAULT_NUM_EVALUATIONS, LOSS, TrainConfig
from trainer.encoding import EncodedExample
from trainer.errors import BadSetting, Diverged
from trainer.gradients import StepLoss, add_gradients
from trainer.held_out_loss import gap_error, mean_loss, with_other_prompts
from trainer.inspection import Inspection
from trainer.loss import Objective, next_token_loss
from trainer.prefix_cache import KeyValues
from trainer.prefix_encoder import PrefixEncoder
from trainer.records import Observer, Record
from trainer.run_folder import RunFolder
from trainer.schedule import Schedule

ADAM_BETAS: Final = (0.9, 0.98)


class HeldOutMetrics(Protocol):
    """Metrics of generated answers, by name, higher is better: what a run may be selected by beside its loss."""

    def __call__(self, prefix: KeyValues) -> Mapping[str, float]: ...


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls. `keep`: with the best prefix so far and the run's progress, to store it. `should_stop`:
    asked after each step; a run that was asked to stop leaves a checkpoint.
    """

    observers: Sequence[Observer]
    keep: Callable[[KeyValues, Progress], None]
    metrics: HeldOutMetrics | None = None
    should_stop: Callable[[], bool] = _never
    objective: Objective = next_token_loss


@dataclass(slots=True)
class Loop:
    """One run. Invariant: whenever `keep` was called, the best prefix is in the next checkpoint too."""

    base: FrozenBase
    encoder: PrefixEncoder
    config: TrainConfig
    training: Sequence[EncodedExample]
    held_out: Sequence[EncodedExample]
    folder: RunFolder
    origin: Origin
    hooks: Hooks
    progress: Progress = field(default_factory=Progress)
    best: KeyValues | None = None

    _optimizer: torch.optim.Optimizer = field(init=False)
    _schedule: Schedule = field(init=False)
    _order: DataOrder = field(init=False)
    _inspection: Inspection = field(init=False)
    _since: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        config = self.config
        self._optimizer = make_optimizer(self.encoder, config)
        lengths = [example.num_tokens for example in self.training]
        self._order = DataOrder(lengths, config.batch_size, config.seed)
        num_steps = config.num_steps_for(self._order.steps_per_epoch)
        warmup = math.ceil(config.warmup_fraction * num_steps)
        self._schedule = Schedule(config.peak_learning_rate, num_steps, warmup, config.schedule)
        self.encoder.eval()
        with torch.no_grad():
            self._inspection = Inspection(self.base, self.encoder(), self.held_out)

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self._schedule.num_steps

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where the checkpoint was made. Raises `CannotResume`."""
        checkpoint.restore(self.encoder, self._optimizer)
        self.progress, self.best = checkpoint.progress, checkpoint.best

    def run(self) -> str:
        """Trains until the end; returns why it ended. The best prefix is in `best` then.

        A run that has ended stays as it is, so a resumed one may be resumed again. Raises `Diverged` and `RunFolderFailed`, both of which leave the last checkpoint as it was.
        """
        if self.progress.ended is not None:
            return self.progress.ended
        self._since = time.monotonic() - self.progress.seconds
        try:
            reason = self._train()
        except Diverged:
            self._tell_end("diverged")
            raise
        if reason != "interrupted":
            self._tell_end(reason)
        return reason

    def _train(self) -> str:
        if self.progress.evaluated_step < 0:
            self._evaluate()
            self._save()
        reason = "finished"
        while self.progress.step < self.num_steps:
            self._step()
            if self._due(self._evaluation_steps()) and self._evaluate():
                reason = "no improvement"
                break
            if self.hooks.should_stop():
                self._save()
                return "interrupted"
            if self._due(self.config.checkpoint_every or self._evaluation_steps()):
                self._save()
        self.progress.ended = reason
        self._save()
        return reason

    # ---- one step ------------------------------------------------------------------------------

    def _step(self) -> None:
        """One update of the parameters. On a loss that is no number the parameters stay as they were."""
        started = time.monotonic()
        rate = self._schedule.learning_rate(self.progress.step)
        self._require_in_range(rate)
        done, norm = self._gradient()
        if not (math.isfinite(done.mean) and math.isfinite(norm)):
            raise Diverged(self._divergence(done.mean, norm, rate))
        self._update(rate)
        self.progress.step += 1
        self._tell(
            {
                "kind": "step",
                "step": self.progress.step,
                "loss": done.mean,
                "learning_rate": rate,
                "grad_norm": norm,
                "num_tokens": done.num_tokens,
                "tokens_per_second": done.num_tokens / max(time.monotonic() - started, 1e-9),
                "seconds": self._seconds(),
            }
        )

    def _gradient(self) -> tuple[StepLoss, float]:
        """Leaves the step's gradient at the parameters; its loss, and the gradient's norm."""
        self._optimizer.zero_grad(set_to_none=True)
        self.encoder.train()
        done = add_gradients(
            self.base,
            self.encoder,
            [self.training[index] for index in self._order.indices(self.progress.step)],
            rows=self._rows,
            reduction=self.config.loss,
            objective=self.hooks.objective,
        )
        gradients = [p.grad for p in self.encoder.parameters() if p.grad is not None]
        return done, float(torch.nn.utils.get_total_norm(gradients))

    def _update(self, rate: float) -> None:
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), self.config.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def _require_in_range(self, rate: float) -> None:
        """torch takes the step's factors as float32 and has no named error for more than that holds."""
        factors = (
            rate / (1.0 - ADAM_BETAS[0] ** (self.progress.step + 1)),
            rate * self.config.weight_decay,
        )
        if max(factors) > torch.finfo(torch.float32).max:
            raise Diverged(
                f"step {self.progress.step + 1}: the learning rate {rate:.2g}, or that times the weight decay, is more than "
                f"float32 can hold; {self._intact()}. Try a lower --learning-rate or --weight-decay"
            )

    @property
    def _rows(self) -> int:
        """Examples of one forward pass."""
        return self.config.micro_batch_size or self.config.batch_size

    def _divergence(self, loss: float, norm: float, rate: float) -> str:
        return (
            f"step {self.progress.step + 1}: the loss is {loss} and the gradient norm {norm} at learning rate "
            f"{rate:.2g}; {self._intact()}. "
            "Try a lower --learning-rate, a longer --warmup-fraction, or --dtype float32"
        )

    def _intact(self) -> str:
        return f"the prefix of step {self.progress.best_step} and the last checkpoint are intact"

    # ---- evaluation ----------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> bool:
        """Judges the prefix as it is; True when it is time to stop for want of improvement."""
        progress, config = self.progress, self.config
        self.encoder.eval()
        prefix = self.encoder().detached()
        loss = self._held_out_loss(prefix, self.held_out)
        if not math.isfinite(loss):
            raise Diverged(self._divergence(loss, float("nan"), config.peak_learning_rate))
        metrics = dict(self.hooks.metrics(prefix)) if self.hooks.metrics is not None else {}
        self._compare(prefix, loss, metrics)
        progress.evaluated_step = progress.step
        stale = config.patience is not None and progress.num_stale >= config.patience
        record: dict[str, Any] = {
            "kind": "held_out",
            "step": progress.step,
            "loss": loss,
            **metrics,
        }
        first_or_last = stale or progress.step in (0, self.num_steps)
        if first_or_last and len(self.held_out) > 1:
            limit = self.base.spec.position_limit
            room = None if limit is None else limit - prefix.num_virtual_tokens
            others = with_other_prompts(self.held_out, room)
            loss_of = partial(self._held_out_loss, prefix)
            record["loss_other_prompt"] = loss_of(others)
            record["loss_other_prompt_error"] = gap_error(loss_of, self.held_out, others)
        self._tell(record)
        self._tell(self._inspection.look(progress.step, prefix))
        return stale

    def _held_out_loss(self, prefix: KeyValues, examples: Sequence[EncodedExample]) -> float:
        return mean_loss(self.base, prefix, examples, self._rows, self.hooks.objective)

    def _compare(self, prefix: KeyValues, loss: float, metrics: Mapping[str, float]) -> None:
        """Keeps the prefix if it is better than the best so far; of equals the earlier one stays."""
        progress, name = self.progress, self.config.select_by
        if name != LOSS and name not in metrics:
            known = ", ".join([LOSS, *metrics])
            raise BadSetting(f"select_by: {name!r} is not measured here; expected one of {known}")
        score = -loss if name == LOSS else metrics[name]
        if progress.best_score is not None and score <= progress.best_score:
            progress.num_stale += 1
            return
        progress.best_score, progress.best_loss, progress.best_step = score, loss, progress.step
        progress.num_stale = 0
        self.best = prefix
        self.hooks.keep(prefix, progress)

    # ---- around --------------------------------------------------------------------------------

    def _evaluation_steps(self) -> int:
        return self.config.evaluate_every or max(1, self.num_steps // DEFAULT_NUM_EVALUATIONS)

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.num_steps

    def _save(self) -> None:
        self.progress.seconds = self._seconds()
        save_checkpoint(
            self.folder.checkpoint,
            self.origin,
            self.progress,
            self.encoder,
            self._optimizer,
            self.best,
        )

    def _seconds(self) -> float:
        return time.monotonic() - self._since

    def _tell_end(self, reason: str) -> None:
        self._tell(
            {
                "kind": "end",
                "reason": reason,
                "best_step": self.progress.best_step,
                "best_loss": self.progress.best_loss,
                "seconds": self._seconds(),
            }
        )

    def _tell(self, record: Record) -> None:
        for observer in self.hooks.observers:
            observer.on_record(record)


def make_optimizer(encoder: PrefixEncoder, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the encoder's parameters; the learning rate is set anew at each step."""
    return torch.optim.AdamW(
        encoder.parameters(),
        lr=config.peak_learning_rate,
        betas=ADAM_BETAS,
        weight_decay=config.weight_decay,
    )
