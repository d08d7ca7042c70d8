"""Completions of a running server, for judging a version as its clients meet it: `POST /v1/completions`.

Called by `handover` on the main thread; the requests run on a bounded number of worker threads. Prompts go as token
ids, so that both versions are asked exactly the same, and greedily. The stop strings are each version's own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from server.cli_client import TIMEOUT_SECONDS, CommandFailed

if TYPE_CHECKING:
    import httpx2

MAX_CONCURRENT: Final = 16
_BUSY: Final = 503
_NUM_TRIES: Final = 8
_LONGEST_WAIT_SECONDS: Final = 5.0
_SECONDS: Final = re.compile(r"\d{1,6}(\.\d{1,6})?")


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """One version of a task, and the bytes that it must be when it answers."""

    task: str
    version: int
    digest: str

    @property
    def ref(self) -> str:
        """`task@v3`: this version, whatever is live meanwhile."""
        return f"{self.task}@v{self.version}"


def complete_through_server(
    base_url: str,
    headers: dict[str, str],
    version: ServedVersion,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
) -> list[str]:
    """The text for each prompt, in their order. `max_tokens`: of each; `on_done`: called on the workers, once for each.

    Raises `CommandFailed` when the server refuses, is busy for long, can not be reached, or answers as another
    version than was asked for.
    """
    import httpx2

    def complete(prompt: tuple[int, ...], limit: int) -> str:
        body = {
            "model": version.ref,
            "prompt": list(prompt),
            "max_tokens": limit,
            "temperature": 0.0,
        }
        answer = _ask(client, body)
        try:
            text, got = str(answer["choices"][0]["text"]), answer["prefixd"]["digest"]
        except (KeyError, IndexError, TypeError):
            raise _no_prefixd(base_url, answer) from None
        if got != version.digest:
            raise CommandFailed(
                f"{version.ref}: expected an answer of {version.digest}, got one of {got}: "
                "the task was deleted and uploaded anew meanwhile"
            )
        on_done()
        return text

    with httpx2.Client(base_url=base_url, headers=headers, timeout=TIMEOUT_SECONDS) as client:
        workers = ThreadPoolExecutor(MAX_CONCURRENT, thread_name_prefix="complete")
        try:
            return list(workers.map(complete, prompts, max_tokens))
        finally:
            workers.shutdown(cancel_futures=True)


def model_len_behind(base_url: str, headers: dict[str, str], version: ServedVersion) -> int:
    """Tokens of prompt and completion that the server has room for behind this version. Raises `CommandFailed`."""
    import httpx2

    with httpx2.Client(base_url=base_url, headers=headers, timeout=TIMEOUT_SECONDS) as client:
        try:
            response = client.get(f"/v1/models/{version.ref}")
        except httpx2.HTTPError as error:
            raise CommandFailed(f"can not reach {client.base_url}: {error}") from None
    if not response.is_success:
        raise CommandFailed(f"{version.ref}: {_reason(response)}", status=response.status_code)
    return int(response.json()["max_model_len"])


def _ask(client: httpx2.Client, body: dict[str, Any]) -> Any:
    """The answer; a server that is busy is asked again, when it said."""
    import httpx2

    for attempt in range(_NUM_TRIES):
        try:
            response = client.post("/v1/completions", json=body)
        except httpx2.HTTPError as error:
            raise CommandFailed(f"can not reach {client.base_url}: {error}") from None
        if response.status_code != _BUSY or attempt == _NUM_TRIES - 1:
            break
        time.sleep(_wait_seconds(response.headers.get("retry-after", "")))
    if not response.is_success:
        raise CommandFailed(f"{body['model']}: {_reason(response)}", status=response.status_code)
    try:
        return response.json()
    except ValueError:
        raise _no_prefixd(str(client.base_url), response.text) from None


def _wait_seconds(asked: str) -> float:
    """What the server asked for, as far as it is a number (HTTP has dates there too), and not for long."""
    seconds = float(asked) if _SECONDS.fullmatch(asked) else 1.0
    return min(seconds, _LONGEST_WAIT_SECONDS)


def _no_prefixd(base_url: str, answer: object) -> CommandFailed:
    return CommandFailed(f"{base_url}: expected an answer of prefixd, got {str(answer)[:100]!r}")


def _reason(response: httpx2.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}: {response.text[:500]}"
