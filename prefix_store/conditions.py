"""Whether a conditional write finds the state that its caller expects. Pure; called by `catalog` with its lock held."""

from __future__ import annotations

from prefix_store.errors import PreconditionFailed
from prefix_store.spec import PrefixVersion
from prefix_store.task_log import TaskLog


def check_canary(
    log: TaskLog, task: str, *, if_match: str | None, if_none_match: bool = False
) -> None:
    """Raise `PreconditionFailed` unless the task's canary is as expected."""
    if if_none_match and log.canary is not None:
        number = log.canary.version.version
        raise PreconditionFailed(f"task {task!r} has a canary already, version {number}")
    canary = log.canary.version if log.canary else None
    check_match(f"canary of task {task!r}", canary, if_match)


def check_match(what: str, present: PrefixVersion | None, if_match: str | None) -> None:
    """Raise `PreconditionFailed` unless `present`, which is called `what`, is the digest `if_match`, or any for `*`."""
    if if_match is None:
        return
    if present is None:
        raise PreconditionFailed(f"there is no {what} to match")
    if if_match not in ("*", present.digest):
        raise PreconditionFailed(f"the {what} is {present.digest}")
