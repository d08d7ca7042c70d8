"""A run on a terminal: a bar for the steps, a line for each evaluation and each warning. An observer; main thread."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trainer.records import Record


class ProgressLines:
    """A context manager around the run that it shows."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressLines:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_record(self, record: Record) -> None:
        """Shows it."""
        match record["kind"]:
            case "begin":
                self._begin(record)
            case "step":
                self._step(record)
            case "held_out":
                self._held_out(record)
            case "warning":
                self._print(f"note: {record['message']}")

    def _begin(self, record: Record) -> None:
        self._print(
            f"{record['num_training']} examples to train on, {record['num_held_out']} held out; "
            f"{record['num_parameters']:,} parameters"
        )
        for name in ("prompt", "completion"):
            lengths = record["training_tokens"][name]
            self._print(
                f"{name} tokens: {lengths['min']} to {lengths['max']}, median {lengths['median']}"
            )
        total, done = record["num_steps"], record["step"]
        self._task = self._progress.add_task("", total=total, completed=done)

    def _step(self, record: Record) -> None:
        assert self._task is not None, "a run begins before its first step"
        shown = (
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.1e}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=record["step"], description=shown)

    def _held_out(self, record: Record) -> None:
        known = ("kind", "step", "loss", "loss_other_prompt")
        metrics = [
            f"  {name} {value:.2f}"
            for name, value in record.items()
            if name not in known and isinstance(value, float)
        ]
        line = f"step {record['step']}: held-out loss {record['loss']:.4f}{''.join(metrics)}"
        self._print(line)

    def _print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)
