"""`train`: learn the prefix of a task. A command of `python -m trainer`, on the main thread.

Heavy libraries are imported when it runs, so that its help appears at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

from cyclopts import Parameter
from rich.console import Console

from server.cli_client import AdminKey
from trainer.cli_evaluate import Metrics
from trainer.config import TrainConfig
from trainer.errors import BadSetting, Diverged
from trainer.metrics import require_known
from trainer.promotion_rule import parse_rule

if TYPE_CHECKING:
    from trainer.session import MetricsFor, TrainResult

INTERRUPTED: Final = 130
_STOPPING: Final = b"\nstopping after the step under way, with a checkpoint; a second time stops at once, without\n"
FAILED_RUN: Final = 3


class StopRequest:
    """Whether someone asked the run to stop: the first Ctrl-C or SIGTERM asks, a second one does not wait.

    A context manager; when it ends the signals do again what they did before.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        # The second one may end the process while the live table hides the cursor. A plain write: this may interrupt one.
        cursor = b"\x1b[?25h" if os.isatty(2) else b""
        with contextlib.suppress(OSError):
            os.write(2, cursor + _STOPPING)


def train(
    *,
    resume: Annotated[
        Path | None, Parameter(help="Go on with the run in this folder; takes no setting of a run")
    ] = None,
    doctor: Annotated[
        bool,
        Parameter(negative=(), help="Exit with 3 if the doctor finds that the run failed"),
    ] = False,
    metric: Metrics = ("exact_match", "token_f1"),
    evaluate: Annotated[
        int, Parameter(help="Held-out examples to judge the prefix on in the end; 0 for none")
    ] = 200,
    push: Annotated[str | None, Parameter(help="Server to hand the prefix over to")] = None,
    promote_if: Annotated[
        str | None, Parameter(help="When it goes live there, as 'bleu >= live + 0.5'")
    ] = None,
    task: Annotated[
        str | None, Parameter(help="Its task there; the folder's name if left out")
    ] = None,
    admin_key: AdminKey = None,
    config: TrainConfig | None = None,
) -> int:
    """Learn a prefix from examples, and leave it in a run folder with its curves, a report and what the doctor found."""
    if (resume is None) == (config is None):
        raise BadSetting("expected --data and --output for a new run, or --resume FOLDER alone")
    if (push is None) != (promote_if is None):
        raise BadSetting("expected --push and --promote-if together, or neither")
    rule = None if promote_if is None else parse_rule(promote_if)  # before anything is trained
    require_known(metric)
    if evaluate < 0:
        raise BadSetting(f"--evaluate: expected 0 or more examples, got {evaluate}")
    from trainer.judging import hand_over_run, judge_run, require_hand_over

    if rule is not None:
        require_hand_over(_folder(resume, config), task, push, admin_key)
    console = Console(stderr=not sys.stdout.isatty())
    result = _trained(resume, config, console)
    if result.reason == "interrupted":
        print(
            f"stopped at step {result.num_steps}; to go on: prefixd train --resume {result.folder}"
        )
        return INTERRUPTED
    try:
        if evaluate > 0:
            console.print(judge_run(result, metric, evaluate).as_table())
    finally:
        failed = conclude_run(result.folder, console)
    print(f"{result.reason}; best held-out loss {result.best_loss:.4f} at step {result.best_step}")
    print(f"prefix: {result.prefix}")
    if failed and doctor:
        return FAILED_RUN
    if rule is None:
        return 0
    handed = hand_over_run(result, task, rule, push, admin_key)
    console.print(handed.as_table())
    state = "promoted" if handed.promoted else "not promoted"
    print(f"{handed.candidate.ref} {state}: {handed.reason}")
    return handed.exit_code


def _folder(resume: Path | None, config: TrainConfig | None) -> Path:
    path = resume if config is None else config.output
    assert path is not None, "checked before"
    return path


def _trained(resume: Path | None, config: TrainConfig | None, console: Console) -> TrainResult:
    """The run, shown while it goes on. If its loss is no number any more, the findings come before the error."""
    from trainer import session
    from trainer.live_table import open_display
    from trainer.run_folder import RunFolder

    path = _folder(resume, config)
    # Reopening refuses a folder without a checkpoint, and says so before anything is loaded.
    settings = (
        RunFolder.reopen(path).read_config() if config is None else {"select_by": config.select_by}
    )
    try:
        with StopRequest() as stop, open_display(path.name, console) as display:
            attachments = session.Attachments(
                observers=(display,),
                metrics_for=_metrics_for(settings.get("select_by", "loss")),
                should_stop=lambda: stop.asked,
            )
            if config is None:
                return session.resume(path, attachments)
            return session.train(config, attachments)
    except Diverged:
        conclude_run(path, console)
        raise


def _metrics_for(select_by: str) -> MetricsFor | None:
    """What a run must measure beside its loss to be selected by it."""
    from trainer.held_out_metrics import metrics_for

    return None if select_by == "loss" else metrics_for([select_by])


def conclude_run(path: Path, console: Console) -> bool:
    """Plots, report and findings; whether the doctor found that the run failed."""
    from trainer.conclusion import conclude
    from trainer.doctor.shown import as_boxes

    findings = conclude(path)
    console.print(as_boxes(findings))
    return any(finding.failed for finding in findings)
