"""The client side of the admin API: one function that asks, one that explains a refusal.

Called by the commands under `prefixd tasks` and by the trainer's hand-over, on the main thread. Imports the HTTP library when it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

from cyclopts import Parameter

from prefix_store.errors import InvalidTaskName
from prefix_store.spec import check_task_name
from server.config import environment
from server.errors import PrefixdError

if TYPE_CHECKING:
    import httpx2

DEFAULT_URL: Final = "http://127.0.0.1:8000"
TIMEOUT_SECONDS: Final = 300.0  # an upload is proved and made durable before it is answered

Url: TypeAlias = Annotated[
    str | None, Parameter(help=f"The server; PREFIXD_URL, or {DEFAULT_URL}, if left out")
]
AdminKey: TypeAlias = Annotated[
    str | None, Parameter(help="Its admin key; PREFIXD_ADMIN_KEY if left out")
]


class CommandFailed(PrefixdError):
    """The server refused, or could not be reached; the message is for the terminal.

    `status`: what the server answered; None if it did not.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def task_path(task: str, rest: str = "") -> str:
    """The path of a task. In a URL, a name that is none could name another task. Raises `CommandFailed`."""
    try:
        return f"/tasks/{check_task_name(task)}{rest}"
    except InvalidTaskName as error:
        raise CommandFailed(str(error)) from None


def call(
    method: str, path: str, url: str | None, admin_key: str | None, **arguments: Any
) -> httpx2.Response:
    """The server's answer; raises `CommandFailed` for anything but success."""
    import httpx2

    target, headers = _address(path, url, admin_key)
    headers |= arguments.pop("headers", {})
    with _reaching(target):
        response = httpx2.request(
            method, target, headers=headers, timeout=TIMEOUT_SECONDS, **arguments
        )
    if not response.is_success:
        raise CommandFailed(_refusal(response), status=response.status_code)
    return response


@contextlib.contextmanager
def stream(path: str, url: str | None, admin_key: str | None) -> Iterator[httpx2.Response]:
    """A download whose body has not been read; raises `CommandFailed` for anything but success."""
    import httpx2

    target, headers = _address(path, url, admin_key)
    with (
        _reaching(target),
        httpx2.stream("GET", target, headers=headers, timeout=TIMEOUT_SECONDS) as response,
    ):
        if not response.is_success:
            response.read()
            raise CommandFailed(_refusal(response), status=response.status_code)
        yield response


def _address(path: str, url: str | None, admin_key: str | None) -> tuple[str, dict[str, str]]:
    base, headers = server_address(url, admin_key)
    return f"{base}/admin/v1{path}", headers


def server_address(url: str | None, admin_key: str | None) -> tuple[str, dict[str, str]]:
    """The server's base URL, and the header with its admin key. Raises `CommandFailed` without a key."""
    base = (url or environment("URL") or DEFAULT_URL).rstrip("/")
    key = admin_key or environment("ADMIN_KEY")
    if not key:
        raise CommandFailed("no admin key: pass --admin-key or set PREFIXD_ADMIN_KEY")
    return base, {"authorization": f"Bearer {key}"}


@contextlib.contextmanager
def _reaching(target: str) -> Iterator[None]:
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        base = target.partition("/admin/v1")[0]
        raise CommandFailed(f"can not reach {base}: {error}; is the server running?") from None


def _refusal(response: httpx2.Response) -> str:
    """What the server said, with every fault of an artifact on a line of its own."""
    try:
        problem = response.json()
        detail, faults = problem["detail"], problem.get("errors", [])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}: {response.text[:500]}"
    if not faults:
        return f"{response.status_code}: {detail}"
    lines = [f"{fault['pointer']}: {fault['detail']}" for fault in faults]
    return "\n".join([f"{response.status_code}: the artifact was refused", *lines])
