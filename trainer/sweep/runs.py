"""Runs a sweep: one run after the other over the same base and examples, then the pick.

Main thread; called by `cli_sweep` and by programs as `sweep(configs)`. What is finished is not run again, what was
interrupted is resumed, and a run that fails is told and passed over. Scores are those of the stored artifact on the
held-out examples: no other data is ever read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch

from prefix_store.artifact import decode, digest_of
from prefix_store.errors import PrefixStoreError
from server.errors import PrefixdError
from trainer import session
from trainer.blind_spots import require_sight
from trainer.checkpoint import load_checkpoint
from trainer.conclusion import conclude
from trainer.config import LOSS
from trainer.engine_in_process import EngineInProcess
from trainer.errors import CannotResume, RunFolderFailed
from trainer.evaluate import generated_scores
from trainer.held_out_loss import nats_by_example
from trainer.held_out_metrics import metrics_for
from trainer.metrics import loss
from trainer.prefix_cache import KeyValues
from trainer.records import Observer
from trainer.run_folder import RunFolder
from trainer.standard_error import Score, score
from trainer.sweep.folder import Found, make_folder, read_sweep, require_same_sweep, write_sweep
from trainer.sweep.pick import Outcome, Pick, Summary, pick, summarise
from trainer.sweep.plan import Plan, PlannedRun, make_plan
from trainer.sweep.report import write_report
from trainer.sweep.settings import SweepConfig


class Display(Observer, Protocol):
    """Is told of each run beside its records."""

    def on_begin(self, run: PlannedRun, index: int, num_runs: int) -> None: ...

    def on_outcome(self, outcome: Outcome) -> None: ...


class Unseen:
    """Shows nothing."""

    def on_record(self, record: object) -> None:
        """Ignored."""

    def on_begin(self, run: PlannedRun, index: int, num_runs: int) -> None:
        """Ignored."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Ignored."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """`interrupted`: it was asked to stop; the same call goes on. `pick` None: no setting finished with all its seeds."""

    folder: Path
    summaries: list[Summary]
    pick: Pick | None
    interrupted: bool

    @property
    def prefix(self) -> Path | None:
        """The picked artifact."""
        if self.pick is None:
            return None
        return RunFolder(self.folder / "runs" / self.pick.run.name).prefix


def sweep(
    configs: Sequence[SweepConfig],
    display: Display | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SweepResult:
    """All runs of `configs`, which differ in what they vary only. Begins a sweep, or goes on with one.

    Raises `TrainerError`, `ModelRefused` or `ConfigError` for what concerns all runs, before the first begins.
    """
    output = configs[0].output.absolute()
    found = read_sweep(output)
    plan = make_plan(configs, output)
    references = [example.reference for example in plan.material.held_out]
    require_sight(configs[0].pick_by, references, "pick_by")
    sweeping = _Sweep.of(configs, output, plan, found, display or Unseen(), should_stop)
    make_folder(output)
    with RunFolder(output).in_use():
        return sweeping.run()


@dataclass(slots=True)
class _Sweep:
    """A sweep under way. Invariant: `sweep.json` knows every outcome in `outcomes`."""

    configs: tuple[SweepConfig, ...]
    output: Path
    plan: Plan
    found: Found | None
    display: Display
    should_stop: Callable[[], bool]
    engine: EngineInProcess | None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        configs: Sequence[SweepConfig],
        output: Path,
        plan: Plan,
        found: Found | None,
        display: Display,
        should_stop: Callable[[], bool],
    ) -> Self:
        """Raises `RunExists` or `CannotResume` if the folder holds another sweep."""
        base = plan.material.base
        # As the runs have it: with absolute paths, and with the limit on lengths that all of them share.
        shared = plan.runs[0].config
        fixed = {
            name: getattr(shared, name) for name in ("data", "held_out", "model", "max_length")
        }
        told = tuple(config.model_copy(update=fixed | {"output": output}) for config in configs)
        if found is not None:
            require_same_sweep(found, told, session.origin_of(shared, base))
        engine = None
        if configs[0].metric:
            engine = EngineInProcess(base.model, base.tokenizer, base=base.spec)
        return cls(told, output, plan, found, display, should_stop, engine)

    def run(self) -> SweepResult:
        runs = self.plan.runs
        self.outcomes = {r.name: Outcome(r.name, r.setting, r.config.seed, "open") for r in runs}
        self._write()
        interrupted = False
        for index, run in enumerate(runs, start=1):
            self.display.on_begin(run, index, len(runs))
            outcome = self._outcome(run)
            self.outcomes[run.name] = outcome
            self.display.on_outcome(outcome)
            self._write()
            if outcome.state == "open":
                interrupted = True
                break
        summaries, picked = self._judged()
        write_report(self.output, summaries, picked, self.configs)
        return SweepResult(self.output, summaries, picked, interrupted)

    def _outcome(self, run: PlannedRun) -> Outcome:
        """What came of the run: now, or before. A failure is an outcome too."""
        try:
            return self._finished(run) or self._trained(run)
        # RuntimeError: what torch says of everything, such as no memory left.
        except (PrefixdError, PrefixStoreError, RuntimeError) as error:
            return Outcome(
                run.name, run.setting, run.config.seed, "failed", f"{type(error).__name__}: {error}"
            )

    def _finished(self, run: PlannedRun) -> Outcome | None:
        """Of a run that ended in an earlier call."""
        folder = RunFolder(run.config.output)
        if not folder.checkpoint.is_file():
            return None
        if load_checkpoint(folder.checkpoint, torch.device("cpu")).progress.ended is None:
            return None
        known = None if self.found is None else self.found.outcomes.get(run.name)
        names = {LOSS, *self.configs[0].metric}
        kept = known is not None and known.prefix == digest_of(_read(folder.prefix))
        return known if known and kept and names <= known.scores.keys() else self._measured(run)

    def _trained(self, run: PlannedRun) -> Outcome:
        if self.should_stop():
            return Outcome(run.name, run.setting, run.config.seed, "open")
        select_by, material = run.config.select_by, self.plan.material
        attachments = session.Attachments(
            observers=(self.display,),
            metrics_for=None if select_by == LOSS else metrics_for([select_by]),
            should_stop=self.should_stop,
        )
        folder = RunFolder(run.config.output)
        if folder.checkpoint.is_file():
            result = session.resume(folder.path, attachments, material)
        else:
            _clear(folder.path)
            result = session.train(run.config, attachments, material)
        if result.reason == "interrupted":
            return Outcome(run.name, run.setting, run.config.seed, "open")
        return self._measured(run)

    def _measured(self, run: PlannedRun) -> Outcome:
        """Scores of the run's best prefix; its curves and report are drawn anew."""
        folder = RunFolder(run.config.output)
        artifact = _read(folder.prefix)
        progress = load_checkpoint(folder.checkpoint, torch.device("cpu")).progress
        findings = conclude(folder.path)
        return Outcome(
            name=run.name,
            setting=run.setting,
            seed=run.config.seed,
            state="finished",
            scores=self._scores(artifact, run),
            prefix=digest_of(artifact),
            best_step=progress.best_step,
            num_steps=progress.step,
            seconds=progress.seconds,
            findings=tuple(finding.name for finding in findings),
        )

    def _scores(self, artifact: bytes, run: PlannedRun) -> dict[str, Score]:
        base, held_out = self.plan.material.base, self.plan.material.held_out
        stored = decode(artifact, digest_of(artifact))
        tensors = [tensor.to(base.device) for tensor in (*stored.keys, *stored.values)]
        rows = run.config.micro_batch_size or run.config.batch_size
        nats = nats_by_example(base, KeyValues.of(tensors), held_out, rows)
        found = {LOSS: score(nats, loss)}
        if self.engine is not None:
            found |= generated_scores(self.engine, artifact, held_out, self.configs[0].metric)
        return found

    def _judged(self) -> tuple[list[Summary], Pick | None]:
        summaries = summarise(list(self.outcomes.values()))
        if any(outcome.state == "open" for outcome in self.outcomes.values()):
            return summaries, None
        return summaries, pick(summaries, self.configs[0].pick_by)

    def _write(self) -> None:
        summaries, picked = self._judged()
        material = self.plan.material
        origin = session.origin_of(self.plan.runs[0].config, material.base)
        write_sweep(self.output, self.configs, origin, len(material.held_out), summaries, picked)


def _clear(path: Path) -> None:
    """Removes what a run left that was killed before its first checkpoint: nothing in it can be gone on with."""
    try:
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        raise RunFolderFailed(f"{path} could not be removed: {error.strerror}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CannotResume(f"{path}: {error.strerror}; remove the folder to run it again") from None
