"""The hand-over of a prefix to a running server: stored first, judged there beside the live version, then promoted
or left.

Runs on the main thread; called by `prefixd hand-over` and at the end of `prefixd train --push`. Until the rule
holds no client meets the new version, because only its own name leads to it. The promotion carries the digest that was
live while the versions were compared (If-Match): a live version that moved meanwhile is not overwritten.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.table import Table

from server.cli_client import CommandFailed, call, server_address, task_path
from trainer.blind_spots import require_sight
from trainer.encoding import EncodedExample
from trainer.engine_in_process import Progress
from trainer.errors import BadData
from trainer.evaluate import max_tokens_for
from trainer.metrics import METRICS, Rows
from trainer.promotion_rule import PromotionRule
from trainer.served_completions import (
    ServedVersion,
    complete_through_server,
    model_len_behind,
)
from trainer.standard_error import Score, difference, score

if TYPE_CHECKING:
    import httpx2

PROMOTED: Final = 0
NOT_PROMOTED: Final = 3
_PRECONDITION_FAILED: Final = 412
_NOT_FOUND: Final = 404


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """Where to, with which key; None takes the environment's or the default, as `prefixd tasks` does."""

    url: str | None = None
    admin_key: str | None = None


@dataclass(frozen=True, slots=True)
class HandOver:
    """What came of it. `live`: what was live while both were judged. `gain`: new minus live, paired."""

    rule: str
    candidate: ServedVersion
    live: ServedVersion | None
    num_examples: int
    candidate_scores: dict[str, Score]
    live_scores: dict[str, Score]
    gain: dict[str, Score]
    promoted: bool
    reason: str

    @property
    def exit_code(self) -> int:
        """0 when the new version is live now, 3 when it is not."""
        return PROMOTED if self.promoted else NOT_PROMOTED

    def as_table(self) -> Table:
        """One row a metric: the new version, the live one, and the difference."""
        table = Table(title=f"{self.num_examples} held-out examples, through the server")
        table.title_justify = "left"
        table.add_column("metric")
        table.add_column(self.candidate.ref, justify="right")
        if self.live is not None:
            table.add_column(f"{self.live.ref} (live)", justify="right")
            table.add_column("difference", justify="right")
        for name, new in self.candidate_scores.items():
            row = [f"{new.value:.2f} ± {new.standard_error:.2f}"]
            if self.live is not None:
                old, gain = self.live_scores[name], self.gain[name]
                row.append(f"{old.value:.2f} ± {old.standard_error:.2f}")
                row.append(f"{gain.value:+.2f} ± {gain.standard_error:.2f}")
            table.add_row(name, *row)
        return table


def hand_over(
    server: ServerAccess,
    artifact: bytes,
    task: str,
    rule: PromotionRule,
    examples: Sequence[EncodedExample],
    *,
    metrics: Sequence[str] = (),
    max_tokens: int | None = None,
    on_progress: Progress | None = None,
) -> HandOver:
    """Uploads, judges, and promotes if `rule` holds. `metrics`: more to show beside the rule's own.

    Raises `CommandFailed` when the server refuses or can not be reached; before anything is sent `BadData` without
    examples, and `BadSetting` for a rule whose metric can not judge them. The upload stays as a stored version
    whatever comes of it.
    """
    if not examples:
        raise BadData("no held-out examples: there is nothing to judge the new version by")
    require_sight(rule.metric, [example.reference for example in examples], "--promote-if")
    candidate = _upload(server, artifact, task)
    live = _live_version(server, task)
    shown = list(dict.fromkeys([rule.metric, *metrics]))
    versions = [v for v in (candidate, live) if v is not None]
    limits = _limits(server, versions, examples, max_tokens)
    found = _judge(server, versions, examples, limits, shown, on_progress)
    new, old = found[0], found[1] if live is not None else {}
    new_scores, old_scores = _scores(new), _scores(old)
    promoted, reason = _decide(server, rule, candidate, live, new_scores, old_scores)
    return HandOver(
        rule=rule.text,
        candidate=candidate,
        live=live,
        num_examples=len(examples),
        candidate_scores=new_scores,
        live_scores=old_scores,
        gain={name: difference(new[name], old[name], METRICS[name].value) for name in old},
        promoted=promoted,
        reason=reason,
    )


def require_reachable(server: ServerAccess, task: str) -> None:
    """Raises `CommandFailed` if no prefix could be handed over now: no key, a wrong one, no server, no such name.

    Changes nothing there. For whoever is about to train for hours first.
    """
    _live_version(server, task)


def _upload(server: ServerAccess, artifact: bytes, task: str) -> ServedVersion:
    """The bytes as a version that is stored and not live. The same bytes are the version that they were."""
    sha = base64.b64encode(hashlib.sha256(artifact).digest()).decode()
    answer = call(
        "PUT",
        task_path(task, "?activate=false"),
        server.url,
        server.admin_key,
        content=artifact,
        headers={
            "content-digest": f"sha-256=:{sha}:",
            "content-type": "application/octet-stream",
        },
    )
    return _version(answer)


def _live_version(server: ServerAccess, task: str) -> ServedVersion | None:
    path = task_path(task, "/aliases/live")
    try:
        return _version(call("GET", path, server.url, server.admin_key))
    except CommandFailed as failed:
        if failed.status == _NOT_FOUND:
            return None
        raise


def _version(response: httpx2.Response) -> ServedVersion:
    """Raises `CommandFailed` for the answer of something that is no prefixd, such as a proxy's page."""
    try:
        answer = response.json()
        return ServedVersion(answer["task"], answer["version"], answer["digest"])
    except (ValueError, KeyError, TypeError):
        raise CommandFailed(
            f"{response.url}: expected an answer of prefixd, got {response.text[:100]!r}"
        ) from None


def _limits(
    server: ServerAccess,
    versions: Sequence[ServedVersion],
    examples: Sequence[EncodedExample],
    max_tokens: int | None,
) -> list[int]:
    """`max_tokens` of each example, the same for all versions; a default is cut to what the longest prefix leaves."""
    if max_tokens is not None:
        return [max_tokens] * len(examples)
    most = max_tokens_for(examples)
    room = min(model_len_behind(*server_address(server.url, server.admin_key), v) for v in versions)
    return [max(1, min(most, room - len(e.prompt_token_ids))) for e in examples]


def _judge(
    server: ServerAccess,
    versions: Sequence[ServedVersion],
    examples: Sequence[EncodedExample],
    limits: Sequence[int],
    metrics: Sequence[str],
    on_progress: Progress | None,
) -> list[dict[str, Rows]]:
    """Rows by metric, for each version."""
    base_url, headers = server_address(server.url, server.admin_key)
    prompts = [example.prompt_token_ids for example in examples]
    references = [example.reference for example in examples]
    done, lock = 0, threading.Lock()

    def on_done() -> None:
        nonlocal done
        with lock:
            done += 1
            if on_progress is not None:
                on_progress(done, len(versions) * len(prompts))

    found = []
    for version in versions:
        texts = complete_through_server(base_url, headers, version, prompts, limits, on_done)
        found.append({name: METRICS[name].rows(texts, references) for name in metrics})
    return found


def _scores(rows: dict[str, Rows]) -> dict[str, Score]:
    return {
        name: score(found, METRICS[name].value, yes_or_no=METRICS[name].yes_or_no)
        for name, found in rows.items()
    }


def _decide(
    server: ServerAccess,
    rule: PromotionRule,
    candidate: ServedVersion,
    live: ServedVersion | None,
    new: dict[str, Score],
    old: dict[str, Score],
) -> tuple[bool, str]:
    """Whether the candidate is live in the end, and why."""
    if candidate == live:
        return True, f"{candidate.ref} was live already: the server has these very bytes"
    if live is None and rule.needs_live:
        return False, (
            f"task {candidate.task!r} has no live version, and the rule compares with one; "
            f"promote {candidate.ref} by hand, or state a rule without 'live'"
        )
    got, bar = new[rule.metric].value, old[rule.metric].value if old else None
    compared = f"{rule.metric} {got:.2f}, asked for {rule.comparison} {rule.bound(bar):.2f}"
    if not rule.holds(got, bar):
        return False, f"{compared} ({rule.text})"
    moved = _promote(server, candidate, live)
    return (False, moved) if moved else (True, f"{compared} ({rule.text})")


def _promote(server: ServerAccess, candidate: ServedVersion, live: ServedVersion | None) -> str:
    """Makes the candidate live, if `live` still is; otherwise the reason why it was left alone."""
    headers = {} if live is None else {"if-match": f'"{live.digest}"'}
    if live is None and (now := _live_version(server, candidate.task)) is not None:
        return f"{now.ref} was made live meanwhile by someone else, and is left so"
    try:
        call(
            "PUT",
            task_path(candidate.task, "/aliases/live"),
            server.url,
            server.admin_key,
            json={"version": candidate.version},
            headers=headers,
        )
    except CommandFailed as failed:
        if failed.status != _PRECONDITION_FAILED:
            raise
        assert live is not None, "only a promotion with If-Match is refused so"
        now = _live_version(server, candidate.task)
        moved = f"to {now.ref}" if now is not None else "away"
        return f"the live version moved from {live.ref} {moved} meanwhile, and is left so"
    return ""
