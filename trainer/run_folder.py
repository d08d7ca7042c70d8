"""The folder of one run, and the only code that writes to it.

    config.json              the settings as they were used
    log.jsonl                the records, one a line (`records`)
    checkpoint/last.safetensors   all that a resumed run needs
    prefix.safetensors       the best prefix so far: an artifact that any server of the base takes
    plots/, report.html      made from the log

Main thread. A file is written under another name, made durable and then renamed, so that after a crash or on a full
disk the one before it is intact. Every `OSError` becomes `RunFolderFailed`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trainer.errors import CannotResume, RunExists, RunFolderFailed
from trainer.finite_json import finite
from trainer.records import Record

_NO_LOCKS: Final = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_INTACT: Final = "the last checkpoint and the best prefix so far are intact"


class RunFolder:
    """The paths of a run, and writes that either last or leave what was there. An observer: it keeps the log."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint" / "last.safetensors"

    @property
    def prefix(self) -> Path:
        return self.path / "prefix.safetensors"

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """A new run. Raises `RunExists` if the folder holds anything."""
        folder = cls(path)
        with _translated(path):
            path.mkdir(parents=True, exist_ok=True)
            folder.require_free()
            folder.checkpoint.parent.mkdir()
        folder.write(folder.config, (json.dumps(config, indent=2) + "\n").encode())
        return folder

    def require_free(self) -> None:
        """Raises `RunExists` if the folder holds anything, and says what can be done with it."""
        with _translated(self.path):
            if not self.path.is_dir() or not any(self.path.iterdir()):
                return
        if self.checkpoint.exists():
            what = f"prefixd train --resume {self.path} goes on with it"
        elif self.config.exists():
            what = "it holds a run that ended before its first checkpoint; remove it if nobody needs it"
        else:
            what = "nothing in it is touched"
        raise RunExists(f"{self.path} is not empty: choose another --output; {what}")

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """A run to go on with. Raises `CannotResume`."""
        folder = cls(path)
        if not folder.checkpoint.is_file():
            raise CannotResume(f"{path} holds no checkpoint to go on from")
        return folder

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The folder is this process's alone until the block ends, or the process. Raises `RunExists`.

        The lock is on the directory itself, so that nothing has to be cleared away after a crash.
        """
        with _translated(self.path):
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunExists(
                    f"{self.path} is in use by another process: wait until it ends, or stop it first"
                ) from None
            except OSError as error:
                if (
                    error.errno not in _NO_LOCKS
                ):  # some network file systems: then it is up to the user
                    raise RunFolderFailed(f"{self.path}: {error.strerror}") from error
            yield
        finally:
            os.close(fd)

    def mend_log(self) -> None:
        """Cuts off what a killed run left of its last line."""
        if self.log.exists():
            cut_torn_line(self.log)

    def read_config(self) -> dict[str, Any]:
        """The settings that the run began with. Raises `CannotResume`."""
        try:
            found: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CannotResume(f"{self.config}: {error}") from None
        if not isinstance(found, dict):
            raise CannotResume(f"{self.config}: expected a JSON object with the run's settings")
        return found

    def on_record(self, record: Record) -> None:
        """Appends to the log."""
        line = json.dumps(finite(dict(record)), allow_nan=False) + "\n"
        with _translated(self.log), self.log.open("ab") as file:
            file.write(line.encode())

    def write(self, path: Path, data: bytes) -> None:
        """Replaces a file by one that lasts, or leaves it as it was."""
        write_durably(path, data)


def write_durably(path: Path, data: bytes) -> None:
    """The whole of `data` under `path` when this returns, even if the power fails. Raises `RunFolderFailed`."""
    staged = path.with_name(f".{path.name}.new")
    with _translated(path):
        try:
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
            _sync_dir(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)
            raise


def append_durably(path: Path, data: bytes) -> None:
    """`data` behind what the file holds, and there to stay when this returns. Raises `RunFolderFailed`.

    After a crash the last line may be torn: `cut_torn_line`.
    """
    with _translated(path):
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _sync_dir(path.parent)


def cut_torn_line(path: Path) -> None:
    """Ends the file behind its last whole line. Raises `RunFolderFailed`."""
    with _translated(path):
        truncate(path, path.read_bytes().rfind(b"\n") + 1)


def truncate(path: Path, num_bytes: int) -> None:
    """Keeps the first `num_bytes` of a file. Raises `RunFolderFailed`."""
    with _translated(path):
        os.truncate(path, num_bytes)


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "no room left on the device" if error.errno in _NO_ROOM else error.strerror
        raise RunFolderFailed(f"{path} could not be written: {why}; {_INTACT}") from error
