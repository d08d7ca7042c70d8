"""`sweep`: many runs, and the smallest prefix that is as good as the best. A command of `python -m trainer`.

Main thread. Heavy libraries are imported when it runs, so that its help appears at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from trainer.cli_train import INTERRUPTED, StopRequest
from trainer.errors import BadSetting, CannotResume, TrainerError
from trainer.sweep.settings import SweepConfig, read_sweep_file

if TYPE_CHECKING:
    from trainer.sweep.runs import SweepResult


def sweep(
    file: Annotated[
        Path | None, Parameter(help="The sweep as TOML or JSON; takes no other setting")
    ] = None,
    /,
    *,
    resume: Annotated[
        Path | None, Parameter(help="Go on with the sweep in this folder; takes no other setting")
    ] = None,
    config: SweepConfig | None = None,
) -> int:
    """Train a prefix for each combination of the given values, and pick the smallest that is as good as the best.

    What it compares and picks by are scores on the held-out examples; keep others for the figure that you report.
    """
    configs = _configs(file, resume, config)
    from trainer.sweep import runs
    from trainer.sweep.display import SweepDisplay

    console = Console(stderr=not sys.stdout.isatty())
    with StopRequest() as stop, SweepDisplay(console) as display:
        result = runs.sweep(configs, display, lambda: stop.asked)
    _show(result)
    if result.interrupted:
        print(f"stopped; to go on: prefixd sweep --resume {result.folder}")
        return INTERRUPTED
    if result.pick is None:
        raise TrainerError("no setting finished with all its seeds: there is nothing to pick")
    print(f"picked {result.pick.picked.setting}: {result.pick.rule}")
    print(f"report: {result.folder / 'report.html'}")
    print(f"prefix: {result.prefix}")
    return 0


def _configs(
    file: Path | None, resume: Path | None, config: SweepConfig | None
) -> tuple[SweepConfig, ...]:
    if sum(given is not None for given in (file, resume, config)) != 1:
        raise BadSetting("expected --data and --output, or a FILE alone, or --resume FOLDER alone")
    if file is not None:
        return read_sweep_file(file)
    if config is not None:
        return (config,)
    from trainer.sweep.folder import read_sweep

    assert resume is not None, "one of the three"
    found = read_sweep(resume)
    if found is None:
        raise CannotResume(f"{resume} holds no sweep to go on with")
    return found.configs


def _show(result: SweepResult) -> None:
    from trainer.sweep.shown import as_rich, means_table

    Console().print(as_rich(means_table(result.summaries, result.pick)))
