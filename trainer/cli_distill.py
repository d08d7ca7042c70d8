"""`distill`: learn a prefix that stands for a document. A command of `python -m trainer`, on the main thread.

Heavy libraries are imported when it runs, so that its help appears at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from trainer.cli_train import FAILED_RUN, INTERRUPTED, StopRequest, conclude_run
from trainer.distill.config import DistillConfig
from trainer.errors import BadSetting, Diverged


def distill(
    *,
    resume: Annotated[
        Path | None, Parameter(help="Go on with the run in this folder; takes no other setting")
    ] = None,
    doctor: Annotated[
        bool,
        Parameter(negative=(), help="Exit with 3 if the doctor finds that the run failed"),
    ] = False,
    config: DistillConfig | None = None,
) -> int:
    """Learn a prefix that stands for DOCUMENT: the base talks with itself about it, the prefix learns its logits.

    At the end it is compared with the document in the prompt and with no document.
    """
    if (resume is None) == (config is None):
        raise BadSetting("expected --document and --output for a new run, or --resume FOLDER alone")
    from trainer.distill import distillation
    from trainer.distill.stage_display import StageDisplay
    from trainer.session import Attachments

    console = Console(stderr=not sys.stdout.isatty())
    path = resume if config is None else config.output
    assert path is not None, "checked above"
    try:
        with StopRequest() as stop, StageDisplay(path.name, console) as display:
            attachments = Attachments(observers=(display,), should_stop=lambda: stop.asked)
            if config is None:
                result = distillation.resume(path, attachments, display.on_stage)
            else:
                result = distillation.distill(config, attachments, display.on_stage)
    except Diverged:
        conclude_run(path, console)  # when it went wrong, the findings are wanted most
        raise
    if result.training is None or result.comparison is None:
        console.print(
            f"stopped; to go on: prefixd distill --resume {result.folder}",
            markup=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    failed = conclude_run(path, console)
    Console().print(result.comparison.as_table())
    Console().print(f"prefix: {result.training.prefix}", markup=False, soft_wrap=True)
    return FAILED_RUN if failed and doctor else 0
