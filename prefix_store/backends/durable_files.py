"""File operations that either last or say that they did not: the only code that writes to the store.

Its callers reach the file system through the `os` module alone, never through `Path`, so that the tests can put a
simulated one in its place.

`link` creates and never replaces; a new name lasts only after an fsync of its directory, and so does the
name of a new directory in its parent. Every `OSError` becomes `StoreFull` or `StoreFailed` here, with a
message that holds no path. Stateless, any thread; called by `filesystem`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prefix_store.errors import StoreFailed, StoreFull

_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT}
_NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_EXISTING_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Turn an `OSError` into `StoreFull` or `StoreFailed`; the file system's text may hold a path."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFull("no room left for the prefix store") from error
        name = errno.errorcode.get(error.errno or 0, "unknown error")
        raise StoreFailed(f"the file system of the prefix store failed ({name})") from error


def create(path: Path) -> int:
    """A new empty file, open for writing and reading; fails if the name exists or is a link."""
    return os.open(path, _NEW_FILE, 0o600)


def write_all(fd: int, data: bytes) -> None:
    """Append all of `data`: one `os.write` may take only a part of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_fd(fd: int, num_bytes: int) -> bytearray:
    """The first `num_bytes` of a file, or fewer if it is shorter, whatever its file offset is."""
    data = bytearray(num_bytes)
    view, filled = memoryview(data), 0
    while filled < num_bytes:
        got = os.preadv(fd, [view[filled:]], filled)
        if not got:
            break
        filled += got
    view.release()
    del data[filled:]
    return data


def open_existing(path: Path) -> int:
    """A file to be read; fails if the name is a link."""
    return os.open(path, _EXISTING_FILE)


def open_for_appending(path: Path) -> int:
    """An existing file to be written to at its end; fails if the name is a link."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)


def read_file(path: Path) -> bytearray:
    """A whole file in memory of our own, never mapped: a mapped file can shrink under its reader."""
    fd = open_existing(path)
    try:
        return read_fd(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def names_in(path: Path) -> list[str]:
    """The names in a directory, sorted."""
    return sorted(os.listdir(path))


def exists(path: Path) -> bool:
    """Whether something is there."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def is_dir(path: Path) -> bool:
    """Whether this is a directory, or a link to one."""
    return exists(path) and stat.S_ISDIR(os.stat(path).st_mode)


def sync_dir(path: Path) -> None:
    """Make the names in a directory last."""
    fd = os.open(path, _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(path: Path) -> None:
    """A directory whose name lasts, only for us. One that exists is fine; its name is synced again,
    because whoever made it may have failed before it lasted."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    sync_dir(path.parent)


def make_dirs(path: Path) -> None:
    """A directory, and the parents that it lacks, each with a name that lasts."""
    for missing in reversed([p for p in (path, *path.parents) if not exists(p)]):
        make_dir(missing)


def link_new(source: Path, target: Path) -> None:
    """Give a synced file a second name that lasts. Raises `FileExistsError` if `target` exists.

    When this raises anything else, the new name is gone again, as far as the file system allows.
    """
    os.link(source, target, follow_symlinks=False)
    try:
        sync_dir(target.parent)
    except OSError:
        remove(target)
        raise


def remove(path: Path) -> None:
    """Remove a file if that is possible; what stays behind is swept when the store is next opened."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def close_quietly(fd: int) -> None:
    """Close a file whose content no longer matters."""
    with contextlib.suppress(OSError):
        os.close(fd)
