"""`prefixd tasks`: the admin API of a running server, from the command line. Runs on the main thread."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

from cyclopts import App, Parameter

from server.config import environment
from server.errors import PrefixdError

if TYPE_CHECKING:
    import httpx2

DEFAULT_URL: Final = "http://127.0.0.1:8000"
TIMEOUT_SECONDS: Final = 300.0  # an upload is proved and made durable before it is answered
_PAGE: Final = 1000

tasks_app = App(name="tasks", help="Upload, list and remove the tasks of a running server.")

Url: TypeAlias = Annotated[
    str | None, Parameter(help=f"The server; PREFIXD_URL, or {DEFAULT_URL}, if left out")
]
AdminKey: TypeAlias = Annotated[
    str | None, Parameter(help="Its admin key; PREFIXD_ADMIN_KEY if left out")
]


class CommandFailed(PrefixdError):
    """The server refused, or could not be reached; the message is for the terminal."""


@tasks_app.command
def push(
    file: Path,
    *,
    task: Annotated[str | None, Parameter(help="The file's name if left out")] = None,
    url: Url = None,
    admin_key: AdminKey = None,
) -> str:
    """Upload FILE as the new version of a task."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CommandFailed(f"{file}: {error.strerror}") from None
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    headers = {"content-digest": f"sha-256=:{digest}:", "content-type": "application/octet-stream"}
    answer = _call(
        "PUT", f"/tasks/{task or file.stem}", url, admin_key, content=data, headers=headers
    ).json()
    state = "live" if answer["created"] else "unchanged, these bytes were live already"
    lines = [f"{answer['task']}@v{answer['version']}  {answer['digest']}  {state}"]
    lines += [f"warning: {warning}" for warning in answer["warnings"]]
    return "\n".join(lines)


@tasks_app.command(name="list")
def list_tasks(*, url: Url = None, admin_key: AdminKey = None) -> str:
    """List the tasks with their live versions."""
    rows: list[dict[str, Any]] = []
    after = ""
    while True:
        params = {"limit": str(_PAGE), "after": after}
        page = _call("GET", "/tasks", url, admin_key, params=params).json()
        rows += page["data"]
        if not page["has_more"]:
            break
        after = page["last_id"]
    return _table(rows) if rows else "no tasks"


@tasks_app.command
def show(task: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Show a task's versions, newest first."""
    return _table(_call("GET", f"/tasks/{task}", url, admin_key).json()["versions"])


@tasks_app.command(name="rm")
def remove(task: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Remove a task with all its versions."""
    _call("DELETE", f"/tasks/{task}", url, admin_key)
    return f"{task} removed"


def _call(
    method: str, path: str, url: str | None, admin_key: str | None, **arguments: Any
) -> httpx2.Response:
    """The server's answer; raises `CommandFailed` for anything but success."""
    import httpx2

    base = (url or environment("URL") or DEFAULT_URL).rstrip("/")
    key = admin_key or environment("ADMIN_KEY")
    if not key:
        raise CommandFailed("no admin key: pass --admin-key or set PREFIXD_ADMIN_KEY")
    headers = {**arguments.pop("headers", {}), "authorization": f"Bearer {key}"}
    try:
        response = httpx2.request(
            method,
            f"{base}/admin/v1{path}",
            headers=headers,
            timeout=TIMEOUT_SECONDS,
            **arguments,
        )
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise CommandFailed(f"can not reach {base}: {error}; is the server running?") from None
    if not response.is_success:
        raise CommandFailed(_refusal(response))
    return response


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


def _table(versions: list[dict[str, Any]]) -> str:
    lines = [f"{'TASK':<24} {'VERSION':>7} {'TOKENS':>6} {'BYTES':>12}  {'DIGEST':<19}  CREATED"]
    lines += [
        f"{v['task']:<24} {'v' + str(v['version']):>7} {v['num_virtual_tokens']:>6} "
        f"{v['size']:>12}  {v['digest'][:19]}  {v['created_at']}"
        for v in versions
    ]
    return "\n".join(lines)
