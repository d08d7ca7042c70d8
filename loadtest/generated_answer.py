"""One answer of `POST /generate` as it comes: server-sent events to what the recorder wants to know.

Runs on the event loop, called by `wire` for each piece. The native route is used because its last event says from which
tier the prefix came, and its events how many tokens each brings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from loadtest.recorder import Outcome, Recorder

_REFUSALS: Final = (429, 503)
_SEPARATOR: Final = b"\n\n"
_MAX_ERROR_BYTES: Final = 65_536
_MAX_CODE: Final = 60


def request_body(task: str, prompt: list[int], max_tokens: int) -> bytes:
    """Greedy, and as long as asked for whatever the model says."""
    body = {
        "task": task,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stop": [],
        "stream": True,
        "return_token_ids": True,
    }
    return json.dumps(body, separators=(",", ":")).encode()


class GeneratedAnswer:
    """`clock` gives seconds since the run's start. `is_over`: whether what ends now was ended by us."""

    __slots__ = (
        "_buffer",
        "_clock",
        "_error",
        "_index",
        "_is_over",
        "_last",
        "_record",
        "_status",
        "_tier",
        "_wanted",
    )

    def __init__(
        self,
        index: int,
        num_wanted: int,
        record: Recorder,
        clock: Callable[[], float],
        is_over: Callable[[], bool],
    ) -> None:
        self._index = index
        self._wanted = num_wanted
        self._record = record
        self._clock = clock
        self._is_over = is_over
        self._status = 0
        self._buffer = b""
        self._last: float | None = None
        self._tier = ""
        self._error: str | None = None

    def on_status(self, status: int) -> None:
        self._status = status

    def on_body(self, data: bytes) -> None:
        if self._status != 200:
            self._buffer = (self._buffer + data)[:_MAX_ERROR_BYTES]
            return
        now = self._clock()
        *events, self._buffer = (self._buffer + data).split(_SEPARATOR)
        for event in events:
            if event.startswith(b"data: {"):
                self._take(event[6:], now)

    def on_end(self) -> None:
        now = self._clock()
        got = int(self._record.num_output[self._index])
        if self._status != 200:
            refused = self._status in _REFUSALS
            reason = f"{self._status} {_code(self._buffer)}".strip()
            self._fail(Outcome.REFUSED if refused else Outcome.FAILED, reason, now)
        elif self._error is not None:
            self._fail(Outcome.FAILED, f"200, then {self._error}", now)
        elif got != self._wanted:
            self._fail(Outcome.FAILED, "200, but another number of tokens than asked for", now)
        else:
            self._record.done(self._index, self._tier, now)

    def on_failure(self, reason: str) -> None:
        outcome = Outcome.UNFINISHED if self._is_over() else Outcome.FAILED
        self._fail(outcome, reason, self._clock())

    def _take(self, text: bytes, now: float) -> None:
        try:
            event: dict[str, Any] = json.loads(text)
        except ValueError:
            self._error = "no JSON"
            return
        if "error" in event:
            self._error = _code(text)
            return
        count = len(event.get("token_ids", ()))
        if count:
            gap = None if self._last is None else now - self._last
            self._record.tokens(self._index, count, gap, now)
            self._last = now
        self._tier = event.get("prefix_tier", self._tier)

    def _fail(self, outcome: Outcome, reason: str, now: float) -> None:
        self._record.failed(self._index, outcome, reason, now)


def _code(body: bytes) -> str:
    """The server's word for an error, of the bodies that it, or a proxy before it, sends."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(code)[:_MAX_CODE]
