"""The runs of a sweep, each with settings that say all: made once base and data are there, before anything is trained.

Main thread; called by `runs`. All runs train on the same examples and are judged on the same: where some do not fit
behind the longest prefix, no run gets them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trainer import session
from trainer.base import FrozenBase
from trainer.config import TrainConfig
from trainer.initial import num_virtual_tokens
from trainer.session import Material
from trainer.sweep.pick import Setting
from trainer.sweep.settings import SweepConfig, shared_settings

RUNS: Final = "runs"


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """`config.output` is its run folder; what it left to defaults is written out."""

    name: str
    setting: Setting
    config: TrainConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """All runs, shortest prefix first, and what they share."""

    runs: tuple[PlannedRun, ...]
    material: Material


def make_plan(configs: Sequence[SweepConfig], output: Path) -> Plan:
    """Loads base and data once. Raises `BadSetting` if one run is impossible, `BadData` or `ModelRefused`."""
    shared = shared_settings(configs[0])
    assert all(shared_settings(config) == shared for config in configs), "parts of one sweep"
    wanted = [session.absolute(run) for config in configs for run in config.runs()]
    base = session.open_base(wanted[0])
    written_out = [_written_out(run, base) for run in wanted]
    for run in written_out:
        session.encoding_settings(run, base)  # can this base have such a prefix at all?
    longest = max(written_out, key=_length)
    material = session.gather(longest, base)
    update: dict[str, Any] = {}
    if any(notice.code == "too_long" for notice in material.notices):
        update["max_length"] = session.encoding_settings(longest, base).max_tokens
    named = {name_of(run): run for run in sorted(written_out, key=_length)}
    runs = [
        PlannedRun(
            name, setting_of(run), run.model_copy(update=update | {"output": output / RUNS / name})
        )
        for name, run in named.items()
    ]
    return Plan(tuple(runs), material)


def _length(run: TrainConfig) -> int:
    assert run.num_virtual_tokens is not None, "written out"
    return run.num_virtual_tokens


def _written_out(run: TrainConfig, base: FrozenBase) -> TrainConfig:
    """The same with nothing left to a default that another version might choose otherwise."""
    count = num_virtual_tokens(base.tokenizer, run)
    update = {
        "num_virtual_tokens": count,
        "init": run.init_kind,
        "learning_rate": run.peak_learning_rate,
    }
    return run.model_copy(update=update)


def setting_of(run: TrainConfig) -> Setting:
    """What it varies, but for the seed."""
    return Setting(_length(run), run.encoder, run.init_kind, run.init_text, run.peak_learning_rate)


def name_of(run: TrainConfig) -> str:
    """Of its folder: says all that is varied, a text by its hash."""
    start: str = run.init_kind
    if run.init_text is not None:
        start += f"-{hashlib.sha256(run.init_text.encode()).hexdigest()[:8]}"
    rate = run.peak_learning_rate
    return f"P{run.num_virtual_tokens}-{run.encoder}-{start}-lr{rate}-s{run.seed}"
