"""`prefixd tasks push` and `pull`: artifacts to a server and back, in bounded memory, with a progress bar.

Runs on the main thread. The bar is shown when stdout is a terminal, and never in a pipe. What is pulled is
verified against its digest before it has its name.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Final

from cyclopts import Parameter

from server.cli_client import AdminKey, CommandFailed, Url, call, stream, task_path
from server.cli_report import lines_of

_PIECE: Final = 2**18
Advance = Callable[[int], None]


def push(
    file: Path,
    *,
    task: Annotated[str | None, Parameter(help="The file's name if left out")] = None,
    activate: Annotated[bool, Parameter(help="Make it the live version")] = True,
    dry_run: Annotated[bool, Parameter(negative=(), help="Prove it only; store nothing")] = False,
    rebase: Annotated[
        bool, Parameter(negative=(), help="Rotate its keys so that requests start behind it")
    ] = False,
    peft_type: Annotated[str | None, Parameter(help="Where a PEFT file fits several")] = None,
    task_index: Annotated[int | None, Parameter(help="Which task of a multitask file")] = None,
    url: Url = None,
    admin_key: AdminKey = None,
) -> str:
    """Upload FILE as a version of a task, and make it live."""
    given = {
        "activate": None if activate else "false",
        "dry_run": "true" if dry_run else None,
        "rebase": "true" if rebase else None,
        "peft_type": peft_type,
        "task_index": task_index,
    }
    params = {name: str(value) for name, value in given.items() if value is not None}
    try:
        answer = _sent(file, task_path(task or file.stem), params, url, admin_key)
    except OSError as error:
        raise CommandFailed(f"{file}: {error.strerror}") from None
    if dry_run:
        lines = [f"{answer['task']}  {answer['digest']}  nothing was stored"]
    else:
        lines = [f"{answer['task']}@v{answer['version']}  {answer['digest']}  {_state(answer)}"]
    return "\n".join([*lines, *lines_of(answer)])


def _sent(
    file: Path, path: str, params: dict[str, str], url: str | None, admin_key: str | None
) -> dict[str, Any]:
    """The answer to an upload of `file`. Raises `OSError` if it can not be read, `CommandFailed`."""
    num_bytes, sha = _measure(file)
    with file.open("rb") as body, _progress(f"push {file.name}", num_bytes) as advance:
        response = call(
            "PUT",
            path,
            url,
            admin_key,
            params=params,
            content=_pieces(body, advance),
            headers={
                "content-digest": f"sha-256=:{base64.b64encode(sha).decode()}:",
                "content-type": "application/octet-stream",
                "content-length": str(num_bytes),
            },
        )
    answer: dict[str, Any] = response.json()
    return answer


def pull(
    ref: str,
    *,
    output: Annotated[Path | None, Parameter(help="TASK-vN.safetensors if left out")] = None,
    url: Url = None,
    admin_key: AdminKey = None,
) -> str:
    """Download TASK, TASK@v3, TASK@canary or TASK@sha256:... as a file that is verified."""
    task, _, selector = ref.partition("@")
    path = task_path(task, f"/versions/{selector or 'live'}")
    version = call("GET", path, url, admin_key).json()
    # By digest: an alias may move between the two requests.
    content = task_path(task, f"/versions/{version['digest']}/content")
    target = output or Path(f"{task}-v{version['version']}.safetensors")
    part = target.with_name(target.name + ".part")
    try:
        with stream(content, url, admin_key) as response:
            digest = _save(response, part, version["size"])
        if digest != version["digest"]:
            raise CommandFailed(f"{ref}: expected {version['digest']}, received {digest}")
        part.replace(target)
    except OSError as error:
        raise CommandFailed(f"{target}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    return f"{target}  {task}@v{version['version']}  {version['digest']}"


def _state(answer: dict[str, Any]) -> str:
    if answer["activated"]:
        return "live" if answer["created"] else "live again, these bytes were a version already"
    return "stored" if answer["created"] else "unchanged, these bytes were a version already"


def _measure(file: Path) -> tuple[int, bytes]:
    """Length and SHA-256 of a file, before any of it is sent."""
    sha, num_bytes = hashlib.sha256(), 0
    with file.open("rb") as body:
        for piece in _pieces(body, lambda _: None):
            sha.update(piece)
            num_bytes += len(piece)
    return num_bytes, sha.digest()


def _pieces(body: IO[bytes], advance: Advance) -> Iterator[bytes]:
    while piece := body.read(_PIECE):
        yield piece
        advance(len(piece))


def _save(response: Any, part: Path, num_bytes: int) -> str:
    """Writes a body to `part`; returns its digest."""
    sha = hashlib.sha256()
    with part.open("wb") as file, _progress(f"pull {part.stem}", num_bytes) as advance:
        for piece in response.iter_bytes(_PIECE):
            file.write(piece)
            sha.update(piece)
            advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return f"sha256:{sha.hexdigest()}"


@contextlib.contextmanager
def _progress(title: str, num_bytes: int) -> Iterator[Advance]:
    """A bar on a terminal, else nothing; it goes when the transfer is done."""
    if not sys.stdout.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task(title, total=num_bytes)
        yield lambda count: progress.advance(bar, count)
