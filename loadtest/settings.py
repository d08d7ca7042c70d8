"""What a load test is asked to do, checked before the server is asked for anything. Pure, on any thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from loadtest.errors import BadLoad
from loadtest.server_view import Served, ServedTask
from loadtest.traffic import Shape

Lengths = tuple[int, int]
_NAME_ROOM: Final = 58  # of 63, for `-0001`; five digits would not sort
MAX_MADE: Final = 9_999


@dataclass(frozen=True, slots=True)
class Plan:
    """One run for each of `num_tasks`, all of the same traffic. `tasks`: names by popularity; `notes` for the report."""

    shape: Shape
    num_tasks: tuple[int, ...]
    tasks: tuple[str, ...]
    base: str
    vocab_size: int
    notes: tuple[str, ...]

    def names(self, num_tasks: int) -> tuple[str, ...]:
        """The names that a run over so many tasks asks for; 0 is the bare base model."""
        return self.tasks[:num_tasks] if num_tasks else (self.base,)


def check_shape(shape: Shape) -> None:
    """Raises `BadLoad` with the flag that is wrong."""
    for flag, value, low in (
        ("--rate", shape.rate, 0.0),
        ("--burstiness", shape.burstiness, 0.0),
        ("--duration", shape.duration_seconds, 0.0),
    ):
        if not (math.isfinite(value) and value > low):
            raise BadLoad(f"{flag} {value:g}: expected more than {low:g}")
    for flag, value in (("--zipf", shape.zipf), ("--warmup", shape.warmup_seconds)):
        if not (math.isfinite(value) and value >= 0):
            raise BadLoad(f"{flag} {value:g}: expected 0 or more")
    if shape.seed < 0:
        raise BadLoad(f"--seed {shape.seed}: expected 0 or more")
    for flag, (low_len, high_len) in (
        ("--input-len", shape.input_len),
        ("--output-len", shape.output_len),
    ):
        if not 1 <= low_len <= high_len:
            raise BadLoad(f"{flag} {low_len} {high_len}: expected 1 or more, the lower first")


def check_made(count: int, name_prefix: str) -> None:
    """Raises `BadLoad` for more tasks than names, or names that do not fit."""
    if not 1 <= count <= MAX_MADE:
        raise BadLoad(f"--make-tasks {count}: expected 1 to {MAX_MADE:,}")
    if not 1 <= len(name_prefix) <= _NAME_ROOM:
        raise BadLoad(f"--name-prefix {name_prefix}: expected 1 to {_NAME_ROOM} characters")


def make_plan(shape: Shape, asked: Sequence[int], served: Served, made: Sequence[str]) -> Plan:
    """What will be run: over the made tasks if there are any, else over those that the server has. Raises `BadLoad`."""
    of_use = [task for task in served.tasks if not made or task.name in set(made)]
    num_tasks = tuple(sorted(set(asked))) or (len(of_use),)
    if min(num_tasks) < 0:
        raise BadLoad(f"--tasks {min(num_tasks)}: expected 0 (the bare base model) or more")
    if max(num_tasks) > len(of_use):
        raise BadLoad(
            f"--tasks {max(num_tasks)}: the server has {len(of_use)} tasks for this; "
            f"--make-tasks {max(num_tasks)} makes some for the time of the test"
        )
    used = [*of_use[: max(num_tasks)], *([served.base] if 0 in num_tasks else [])]
    capped, notes = _capped(shape, used)
    names = tuple(task.name for task in of_use)
    return Plan(capped, num_tasks, names, served.base.name, served.vocab_size, notes)


def _capped(shape: Shape, used: Sequence[ServedTask]) -> tuple[Shape, tuple[str, ...]]:
    """Lengths that fit behind every prefix in use: the same for all runs, or they could not be compared."""
    tightest = min(used, key=lambda task: task.max_model_len)
    limit = tightest.max_model_len
    (low_in, high_in), (low_out, high_out) = shape.input_len, shape.output_len
    if high_in + high_out <= limit:
        return shape, ()
    # The longer of the two gives way first.
    shorter = min(high_in, high_out, limit // 2)
    if high_in <= high_out:
        high_in, high_out = shorter, limit - shorter
    else:
        high_in, high_out = limit - shorter, shorter
    if high_in < low_in or high_out < low_out:
        raise BadLoad(
            f"{tightest.name} has room for {limit} tokens of prompt and answer: "
            "pass shorter --input-len and --output-len"
        )
    note = (
        f"lengths were cut to {low_in}-{high_in} in, {low_out}-{high_out} out: "
        f"{tightest.name} has room for {limit} tokens"
    )
    return replace(shape, input_len=(low_in, high_in), output_len=(low_out, high_out)), (note,)
