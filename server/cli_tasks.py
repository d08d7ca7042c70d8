"""`prefixd tasks`: the admin API of a running server, from the command line. Runs on the main thread.

push | pull                                  in `server.cli_transfer`
list | show | promote | rollback | canary | pin | unpin | warm | evict | rm        here
grant | revoke-grant                                                               here
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

from cyclopts import App, Parameter

from prefix_store.errors import InvalidTenantName
from prefix_store.spec import check_tenant_name
from server.cli_client import AdminKey, CommandFailed, Url, call, task_path
from server.cli_transfer import pull, push

_PAGE: Final = 1000

tasks_app = App(name="tasks", help="Upload, list, move and remove the tasks of a running server.")
tasks_app.command(push)
tasks_app.command(pull)

VersionName: TypeAlias = Annotated[str, Parameter(help="Its number: 3 or v3")]


@tasks_app.command(name="list")
def list_tasks(*, url: Url = None, admin_key: AdminKey = None) -> str:
    """List the tasks with their live versions."""
    rows: list[dict[str, Any]] = []
    after = ""
    while True:
        params = {"limit": str(_PAGE), "after": after}
        page = call("GET", "/tasks", url, admin_key, params=params).json()
        rows += page["data"]
        if not page["has_more"]:
            break
        after = page["last_id"]
    for row in rows:
        canary = row["canary"]
        row["aliases"] = ["live"] if row["live"] else []
        row["aliases"] += [f"canary v{canary['version']} {canary['weight']:.0%}"] if canary else []
    return _table(rows) if rows else "no tasks"


@tasks_app.command
def show(task: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Show a task's versions, newest first."""
    return _table(call("GET", task_path(task), url, admin_key).json()["versions"])


@tasks_app.command
def promote(task: str, version: VersionName, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Make a version live."""
    answer = _move(task, "live", {"version": _number(version)}, url, admin_key)
    return _moved(answer, "live" if answer["changed"] else "live already")


@tasks_app.command
def rollback(task: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Make the version live that was so before."""
    return _moved(call("POST", task_path(task, "/rollback"), url, admin_key).json(), "live again")


@tasks_app.command
def canary(
    task: str,
    version: Annotated[str | None, Parameter(help="Its number; left out with --end")] = None,
    *,
    weight: Annotated[float, Parameter(help="Share of the requests, 0 to 1")] = 0.0,
    end: Annotated[bool, Parameter(negative=(), help="End the trial")] = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> str:
    """Put a version on trial with a share of the task's requests, or end the trial."""
    if end == (version is not None):
        raise CommandFailed("name the version to try, or pass --end")
    if version is None:
        call("DELETE", task_path(task, "/aliases/canary"), url, admin_key)
        return f"{task} has no canary"
    body = {"version": _number(version), "weight": weight}
    return _moved(_move(task, "canary", body, url, admin_key), f"canary with {weight:.1%}")


@tasks_app.command
def pin(
    task: str,
    *,
    ttl: Annotated[float | None, Parameter(help="Seconds; for ever if left out")] = None,
    url: Url = None,
    admin_key: AdminKey = None,
) -> str:
    """Keep a task's live version on the device."""
    body = {"ttl_seconds": ttl}
    answer = call("POST", task_path(task, "/pin"), url, admin_key, json=body).json()
    until = "until it is unpinned" if ttl is None else f"for {ttl:g} s"
    used, budget = answer["pinned_blocks"], answer["pin_budget_blocks"]
    return _moved(answer, f"pinned {until}; {used} of {budget} blocks of the pin budget")


@tasks_app.command
def unpin(task: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Let the cache decide about a task again."""
    call("POST", task_path(task, "/unpin"), url, admin_key)
    return f"{task} unpinned"


@tasks_app.command
def warm(
    task: str,
    version: Annotated[str | None, Parameter(help="Its number; the live one if left out")] = None,
    *,
    url: Url = None,
    admin_key: AdminKey = None,
) -> str:
    """Load a version onto the device before it is asked for."""
    body = {"version": None if version is None else _number(version)}
    answer = call("POST", task_path(task, "/warm"), url, admin_key, json=body).json()
    return _moved(answer, "on its way to the device")


@tasks_app.command
def evict(task: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Free a task on the device, once no request reads it, and in host memory."""
    answer = call("POST", task_path(task, "/evict"), url, admin_key).json()
    return f"{task} evicted, {len(answer['digests'])} versions"


@tasks_app.command
def grant(task: str, tenant: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Let another tenant's keys infer with a task."""
    answer = call("PUT", _grant_path(task, tenant), url, admin_key).json()
    return f"{answer['task']} granted to {', '.join(answer['grants']) or 'nobody'}"


@tasks_app.command
def revoke_grant(task: str, tenant: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """End that."""
    call("DELETE", _grant_path(task, tenant), url, admin_key)
    return f"{task} is not granted to {tenant}"


@tasks_app.command(name="rm")
def remove(task: str, *, url: Url = None, admin_key: AdminKey = None) -> str:
    """Remove a task with all its versions."""
    call("DELETE", task_path(task), url, admin_key)
    return f"{task} removed"


def _grant_path(task: str, tenant: str) -> str:
    try:
        return task_path(task, f"/grants/{check_tenant_name(tenant)}")
    except InvalidTenantName as error:
        raise CommandFailed(str(error)) from None


def _move(
    task: str, alias: str, body: dict[str, Any], url: str | None, admin_key: str | None
) -> dict[str, Any]:
    path = task_path(task, f"/aliases/{alias}")
    answer: dict[str, Any] = call("PUT", path, url, admin_key, json=body).json()
    return answer


def _moved(answer: dict[str, Any], state: str) -> str:
    lines = [f"{answer['task']}@v{answer['version']}  {answer['digest']}  {state}"]
    lines += [f"warning: {warning}" for warning in answer.get("warnings", [])]
    return "\n".join(lines)


def _number(version: str) -> int:
    digits = version.removeprefix("v")
    if not (digits.isascii() and digits.isdecimal()):
        raise CommandFailed(f"version {version!r}: expected a number, as 3 or v3")
    return int(digits)


def _table(versions: list[dict[str, Any]]) -> str:
    lines = [
        f"{'TASK':<24} {'VERSION':>7} {'TOKENS':>6} {'BYTES':>12}  {'DIGEST':<19}  {'CREATED':<29}  ALIASES"
    ]
    lines += [
        f"{v['task']:<24} {'v' + str(v['version']):>7} {v['num_virtual_tokens']:>6} "
        f"{v['size']:>12}  {v['digest'][:19]}  {v['created_at']:<29}  {', '.join(v['aliases'])}".rstrip()
        for v in versions
    ]
    return "\n".join(lines)
