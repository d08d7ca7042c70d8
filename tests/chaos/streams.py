"""Clients that read streams and say how these ended. Used by tests and by `tests.chaos`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2


@dataclass
class Reading:
    """One answer, as its client saw it. `ended`: monotonic seconds; 0 while it lasts."""

    status: int = 0
    num_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    error: str = ""
    done: bool = False
    broken: str = ""
    ended: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether all of it came, and it was what was asked for."""
        return self.done and not self.error and not self.broken and bool(self.finish_reasons)

    @property
    def told(self) -> bool:
        """Whether it ended with a word: whole, or with an error that says so."""
        return bool(self.whole or (self.error and (self.done or self.status >= 400)))

    def take(self, line: str) -> None:
        """One line of the stream."""
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.error = event["error"]["message"]
            for choice in event.get("choices", []):
                self.num_tokens += len(choice.get("token_ids") or [])
                self.finish_reasons += filter(None, [choice["finish_reason"]])


def body(max_tokens: int, *, stream: bool = True, **fields: Any) -> dict[str, Any]:
    """A request to the model that `tests.tiny_model_dir` makes."""
    return {
        "model": "model",
        "prompt": "the quick brown fox",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
        **fields,
    }


async def read(
    client: httpx2.AsyncClient,
    request: dict[str, Any],
    reading: Reading,
    on_token: Callable[[], None] = lambda: None,
) -> Reading:
    """Fills `reading` until the answer ends, however that is."""
    try:
        async with client.stream("POST", "/v1/completions", json=request) as answer:
            reading.status = answer.status_code
            if answer.headers["content-type"].startswith("application/json"):
                _take_whole(reading, json.loads(await answer.aread()))
            else:
                async for line in answer.aiter_lines():
                    reading.take(line)
                    if reading.num_tokens:
                        on_token()
    except httpx2.HTTPError as error:
        reading.broken = type(error).__name__
    reading.ended = time.monotonic()
    return reading


def _take_whole(reading: Reading, answer: dict[str, Any]) -> None:
    if "error" in answer:
        reading.error = answer["error"]["message"]
        return
    reading.done = True
    reading.finish_reasons = [choice["finish_reason"] for choice in answer["choices"]]
    reading.num_tokens = sum(len(choice["token_ids"]) for choice in answer["choices"])


async def read_all(
    url: str, requests: list[dict[str, Any]], when_all_run: Callable[[], None]
) -> tuple[list[Reading], float]:
    """Reads all of them at once; calls `when_all_run` when every stream has a token. Returns also when that was."""
    readings = [Reading() for _ in requests]
    streams = [r for r, request in zip(readings, requests, strict=True) if request["stream"]]
    called: list[float] = []

    def on_token() -> None:
        if not called and all(reading.num_tokens for reading in streams):
            called.append(time.monotonic())
            when_all_run()

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client:
        pairs = zip(requests, readings, strict=True)
        await asyncio.gather(*(read(client, request, r, on_token) for request, r in pairs))
    assert called, "a stream ended before all had begun"
    return readings, called[0]
