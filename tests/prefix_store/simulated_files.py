"""A file system in memory that forgets what was not synced, as POSIX allows it to.

`SimulatedOs` stands in for `os` (and `fcntl`, `secrets`) in the modules that write to the store. Every change is an
*effect* on one inode: bytes written to or cut off a file, a name added to or removed from a directory. An fsync of that
inode makes its effects durable, `sync` makes all. After a power loss any subset of the other effects may be there, and
of the bytes of a write a part; after a kill they all are, and are as volatile as before. A `Disk` is one moment of it,
immutable. One thread; called by `crash_points`.
"""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

ROOT: Final = 1
_EXHAUSTIVE: Final = 4  # up to so many effects, all their subsets are tried
_MOST_AT_ONCE: Final = 400  # bytes that one `write` takes, as a part of what it is given


@dataclass(frozen=True, slots=True)
class Effect:
    """A change of one inode, not synced yet. `kind`: write, truncate, add or remove."""

    inode: int
    kind: str
    name: str = ""
    target: int = 0  # inode that `name` is given to
    offset: int = 0
    data: bytes = b""

    def on_file(self, content: bytes) -> bytes:
        if self.kind == "truncate":
            return content[: self.offset].ljust(self.offset, b"\0")
        return (
            content[: self.offset].ljust(self.offset, b"\0")
            + self.data
            + content[self.offset + len(self.data) :]
        )

    def on_directory(self, names: Mapping[str, int]) -> dict[str, int]:
        rest = {name: inode for name, inode in names.items() if name != self.name}
        return rest | {self.name: self.target} if self.kind == "add" else rest

    def torn(self) -> Iterator[Effect]:
        """Ways in which a part of a write may have survived: cut short, or blocks of it empty."""
        if self.kind != "write":
            return
        half, size = len(self.data) // 2, len(self.data)
        for cut in sorted({1, half, size - 1} - {0, size}):
            yield replace(self, data=self.data[:cut])
        yield replace(self, data=bytes(size))
        yield replace(self, data=self.data[:half] + bytes(size - half))
        yield replace(self, data=bytes(half) + self.data[half:])


@dataclass(frozen=True)
class Disk:
    """What is durable, and the effects that are not, oldest first."""

    files: Mapping[int, bytes] = field(default_factory=dict)
    directories: Mapping[int, Mapping[str, int]] = field(default_factory=lambda: {ROOT: {}})
    pending: tuple[Effect, ...] = ()

    def with_effects(self, effects: tuple[Effect, ...]) -> Disk:
        """These effects durable, and the others forgotten."""
        files, directories = dict(self.files), dict(self.directories)
        for effect in effects:
            if effect.inode in files:
                files[effect.inode] = effect.on_file(files[effect.inode])
            else:
                directories[effect.inode] = effect.on_directory(directories[effect.inode])
        return Disk(files, directories)

    def power_losses(self) -> Iterator[Disk]:
        """What may be found: nothing unsynced, all, each alone, all but each, torn; of few effects every subset."""
        everything = self.pending
        if len(everything) <= _EXHAUSTIVE:
            sizes = range(len(everything) + 1)
            subsets = [s for size in sizes for s in itertools.combinations(everything, size)]
        else:
            alone = [(effect,) for effect in everything]
            without = [(*everything[:at], *everything[at + 1 :]) for at in range(len(everything))]
            subsets = [(), everything, *alone, *without]
        for subset in subsets:
            yield self.with_effects(subset)
        for at, effect in enumerate(everything):
            for torn in effect.torn():
                yield self.with_effects((torn,))
                yield self.with_effects((*everything[:at], torn, *everything[at + 1 :]))

    def tree(self, inode: int = ROOT) -> Any:
        """All that can be reached and is durable, comparable and hashable."""
        if inode in self.files:
            return self.files[inode]
        names = sorted(self.directories[inode].items())
        return tuple((name, self.tree(child)) for name, child in names)


@dataclass
class _Open:
    inode: int
    offset: int = 0
    append: bool = False


class SimulatedOs:
    """The part of `os` that the store uses, over a `Disk`. `after_change` is called behind each change."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._now = disk.with_effects(disk.pending)  # as processes see it
        self._open: dict[int, _Open] = {}
        self._next_fd = itertools.count(1000)
        self._next_inode = itertools.count(max([*disk.files, *disk.directories]) + 1)
        self._next_name = itertools.count(len(disk.files))
        self.after_change: Callable[[], None] = lambda: None
        self.fcntl = SimpleNamespace(
            LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB, flock=lambda fd, how: None
        )
        self.secrets = SimpleNamespace(token_hex=self._token_hex)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("O_") and name not in ("SEEK_SET", "stat_result"):
            raise AttributeError(f"the simulated os has no {name}")
        return getattr(os, name)

    def disk(self) -> Disk:
        """This moment."""
        return self._disk

    def happen(self, effect: Effect) -> None:
        """A change, whoever made it."""
        self._disk = replace(self._disk, pending=(*self._disk.pending, effect))
        self._now = self._now.with_effects((effect,))
        self.after_change()

    # ---- files -------------------------------------------------------------------------------------

    def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:
        directory, name, inode = self._look_up(path)
        if inode is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            inode = next(self._next_inode)
            self._disk = replace(self._disk, files={**self._disk.files, inode: b""})
            self._now = replace(self._now, files={**self._now.files, inode: b""})
            self._add(directory, name, inode)
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, "file exists", str(path))
        if flags & os.O_DIRECTORY and inode not in self._now.directories:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        if flags & (os.O_WRONLY | os.O_RDWR) and inode in self._now.directories:
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        fd = next(self._next_fd)
        self._open[fd] = _Open(inode, append=bool(flags & os.O_APPEND))
        return fd

    def close(self, fd: int) -> None:
        del self._open[fd]

    def write(self, fd: int, data: memoryview) -> int:
        """Takes a part of what is long, which is legal, and gives a crash more places to be."""
        file = self._open[fd]
        part = bytes(data[: max(len(data) // 2, _MOST_AT_ONCE)])
        if file.append:
            file.offset = len(self._now.files[file.inode])
        self.happen(Effect(file.inode, "write", offset=file.offset, data=part))
        file.offset += len(part)
        return len(part)

    def pread(self, fd: int, num_bytes: int, offset: int) -> bytes:
        return self._now.files[self._open[fd].inode][offset : offset + num_bytes]

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        got = self.pread(fd, len(buffer), offset)
        buffer[: len(got)] = got
        return len(got)

    def fdopen(self, fd: int, mode: str) -> io.BytesIO:
        assert mode == "rb"
        content = self._now.files[self._open[fd].inode]
        self.close(fd)
        return io.BytesIO(content)

    def ftruncate(self, fd: int, length: int) -> None:
        self.happen(Effect(self._open[fd].inode, "truncate", offset=length))

    def lseek(self, fd: int, offset: int, how: int) -> int:
        assert how == os.SEEK_SET
        self._open[fd].offset = offset
        return offset

    # ---- syncs -------------------------------------------------------------------------------------

    def fsync(self, fd: int) -> None:
        inode = self._open[fd].inode
        synced = tuple(effect for effect in self._disk.pending if effect.inode == inode)
        rest = tuple(effect for effect in self._disk.pending if effect.inode != inode)
        if synced:
            self._disk = replace(self._disk.with_effects(synced), pending=rest)
            self.after_change()

    def sync(self) -> None:
        self.make_all_durable()

    def make_all_durable(self) -> None:
        """As time does, when nobody asks for it."""
        if self._disk.pending:
            self._disk = self._disk.with_effects(self._disk.pending)
            self.after_change()

    # ---- names -------------------------------------------------------------------------------------

    def mkdir(self, path: str | Path, mode: int = 0o777) -> None:
        directory, name, inode = self._look_up(path)
        if inode is not None:
            raise FileExistsError(errno.EEXIST, "file exists", str(path))
        inode = next(self._next_inode)
        self._disk = replace(self._disk, directories={**self._disk.directories, inode: {}})
        self._now = replace(self._now, directories={**self._now.directories, inode: {}})
        self._add(directory, name, inode)

    def link(self, source: str | Path, target: str | Path, *, follow_symlinks: bool = True) -> None:
        inode = self._existing(source)
        directory, name, taken = self._look_up(target)
        if inode in self._now.directories and taken is None:
            raise PermissionError(errno.EPERM, "is a directory", str(source))
        if taken is not None:
            raise FileExistsError(errno.EEXIST, "file exists", str(target))
        self._add(directory, name, inode)

    def unlink(self, path: str | Path) -> None:
        if self._existing(path) in self._now.directories:
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        directory, name, _ = self._look_up(path)
        self.happen(Effect(directory, "remove", name=name))

    def listdir(self, path: str | Path) -> list[str]:
        inode = self._existing(path)
        if inode not in self._now.directories:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        return list(self._now.directories[inode])

    def stat(self, path: str | Path) -> os.stat_result:
        return self._stat(self._existing(path))

    lstat = stat

    def fstat(self, fd: int) -> os.stat_result:
        return self._stat(self._open[fd].inode)

    # ---- below -------------------------------------------------------------------------------------

    def _add(self, directory: int, name: str, inode: int) -> None:
        self.happen(Effect(directory, "add", name=name, target=inode))

    def _look_up(self, path: str | Path) -> tuple[int, str, int | None]:
        """The directory that `path` is in, its name there, and its inode if it exists."""
        directory, name, inode = ROOT, "", ROOT
        parts = Path(path).parts
        assert parts[0] == "/", "a relative path"
        for at, part in enumerate(parts[1:], start=2):
            if inode not in self._now.directories:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
            directory, name = inode, part
            found = self._now.directories[directory].get(part)
            if found is None:
                if at < len(parts):
                    raise FileNotFoundError(errno.ENOENT, "no such directory", str(path))
                return directory, name, None
            inode = found
        return directory, name, inode

    def _existing(self, path: str | Path) -> int:
        _, _, inode = self._look_up(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return inode

    def _stat(self, inode: int) -> os.stat_result:
        is_file = inode in self._now.files
        mode = (stat.S_IFREG if is_file else stat.S_IFDIR) | 0o600
        size = len(self._now.files[inode]) if is_file else 0
        return os.stat_result((mode, inode, 1, 1, 0, 0, size, 0, 0, 0))

    def _token_hex(self, num_bytes: int) -> str:
        """Not random, so that the same history gives the same disk."""
        return f"{next(self._next_name):0{2 * num_bytes}x}"
