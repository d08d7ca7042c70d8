"""The durable backend: a directory on a local file system that this process owns alone.

    root/ (0700)
      lock                          held by flock while the store is open
      tmp/<random>                  stagings; swept at opening
      blobs/<aa>/<sha256>           artifacts by content; written once
      log/<log>/<%020d>.json        records, numbered from 1; written once

Everything is written to tmp/, synced, then linked to its final name, and the directory synced: a name that
is visible belongs to bytes that are whole, and once a call returned, power loss takes nothing back. Any
thread; a lock makes the linking steps one at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Final

from prefix_store.backends import durable_files as files
from prefix_store.backends.base import DiskUsage
from prefix_store.errors import PrefixUnavailable, StoreFailed, StoreLocked
from prefix_store.spec import digest_of, is_digest

_BLOB_NAME: Final = re.compile(r"[0-9a-f]{64}")
_LOG_NAME: Final = re.compile(r"[0-9a-f]{32}")
_RECORD_NAME: Final = re.compile(r"[0-9]{20}\.json")


class FilesystemBackend:
    """Blobs and logs under `root`. Constructing it locks, repairs and scans the directory.

    Raises `StoreLocked` when another process has it open, `StoreFailed` when it can not be used.
    """

    def __init__(self, root: Path) -> None:
        self._tmp, self._blobs, self._logs = root / "tmp", root / "blobs", root / "log"
        self._commit_lock = threading.Lock()  # one link-and-sync at a time; taken before the next
        self._sizes_lock = threading.Lock()  # never held across a file operation
        self._blob_sizes: dict[str, int] = {}  # digest -> bytes
        with files.translated_errors():
            files.make_dirs(root)
            self._lock_fd = _lock(root / "lock")
            try:
                self._recover()
            except OSError:
                self.close()
                raise

    def close(self) -> None:
        """Release the directory, once a commit that is under way has ended."""
        with self._commit_lock:
            if self._lock_fd >= 0:
                os.close(self._lock_fd)  # and with it the flock
                self._lock_fd = -1

    def stage(self) -> FileStagedBlob:
        """A new empty staging, as a file in tmp/. Raises `StoreFull` or `StoreFailed`."""
        self._require_open()
        with files.translated_errors():
            path = self._tmp / secrets.token_hex(16)
            return FileStagedBlob(self, path, files.create(path))

    def publish_file(self, source: Path, digest: str, num_bytes: int) -> None:
        """Give a synced file in tmp/ its final name; for `FileStagedBlob`."""
        target = self._blob_path(digest)
        with self._commit_lock:
            self._require_open()
            files.make_dir(target.parent)
            try:
                files.link_new(source, target)
            except FileExistsError:
                self._confirm_blob(source, target, digest)
            with self._sizes_lock:
                self._blob_sizes[digest] = num_bytes

    def read_blob(self, digest: str) -> bytearray:
        """A blob in memory; not verified. Raises `PrefixUnavailable`."""
        if not is_digest(digest):
            raise PrefixUnavailable("the digest is not one of this store")
        try:
            return files.read_file(self._blob_path(digest))
        except OSError as error:
            raise PrefixUnavailable("the artifact can not be read from the store") from error

    def open_blob(self, digest: str) -> FileBlobReader:
        """A blob as an open file. Raises `PrefixUnavailable`."""
        if not is_digest(digest):
            raise PrefixUnavailable("the digest is not one of this store")
        try:
            return FileBlobReader(files.open_existing(self._blob_path(digest)))
        except OSError as error:
            raise PrefixUnavailable("the artifact can not be read from the store") from error

    def remove_blob(self, digest: str) -> None:
        """Unlink a blob; readers that have it open keep it."""
        assert is_digest(digest), "a digest becomes a path"
        with self._commit_lock:
            files.remove(self._blob_path(digest))
            self._blob_sizes.pop(digest, None)

    def sweep_blobs(self, keep: Set[str]) -> None:
        """Remove the blobs that are not in `keep`; one that can not be removed is left."""
        with self._commit_lock:
            for digest in self._blob_sizes.keys() - keep:
                files.remove(self._blob_path(digest))
                with self._sizes_lock:
                    del self._blob_sizes[digest]

    def usage(self) -> DiskUsage:
        """What the blobs take now; does not wait for a commit, which may take as long as the disk does."""
        with self._sizes_lock:
            return DiskUsage(sum(self._blob_sizes.values()), len(self._blob_sizes))

    def append_record(self, log: str, index: int, payload: bytes) -> None:
        """Make a new record durable. Raises `StoreFull`, or `StoreFailed` also if it exists."""
        assert _LOG_NAME.fullmatch(log), "a log's name becomes a path"
        target = self._logs / log / f"{index:020d}.json"
        with files.translated_errors(), self._commit_lock:
            self._require_open()
            source = self._write_synced(payload)
            try:
                files.make_dir(target.parent)
                files.link_new(source, target)
            except FileExistsError as error:
                raise StoreFailed(
                    "the version log holds a record that this process did not write; reopen the store"
                ) from error
            finally:
                files.remove(source)

    def read_logs(self) -> Mapping[str, Mapping[int, bytes]]:
        """Every log; a record that can not be read is an empty payload."""
        with files.translated_errors():
            return {
                name: self._read_log(self._logs / name)
                for name in files.names_in(self._logs)
                if _LOG_NAME.fullmatch(name)
            }

    def _require_open(self) -> None:
        if self._lock_fd < 0:  # another process may own the directory by now
            raise StoreFailed("the prefix store is closed")

    def _blob_path(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self._blobs / name[:2] / name

    def _confirm_blob(self, source: Path, target: Path, digest: str) -> None:
        """The blob is there already. If it is damaged, the new bytes, which are right, replace it."""
        try:
            intact = digest_of(files.read_file(target)) == digest
        except OSError:
            intact = False
        if not intact:
            files.remove(target)
            files.link_new(source, target)

    def _write_synced(self, payload: bytes) -> Path:
        """A new file in tmp/ whose bytes last, though its name need not."""
        path = self._tmp / secrets.token_hex(16)
        fd = files.create(path)
        try:
            files.write_all(fd, payload)
            os.fsync(fd)
        except OSError:
            files.remove(path)
            raise
        finally:
            files.close_quietly(fd)
        return path

    def _recover(self) -> None:
        """Bring the directory into its resting state after whatever ended the last process.

        A commit removes its file in tmp/ after its last sync, so a file there may mean a name that was
        linked and not synced. Without any log, whoever made the directories above may have been killed
        before their names lasted. Such names are made to last before anyone relies on them.
        """
        for directory in (self._tmp, self._blobs, self._logs):
            files.make_dir(directory)
        leftovers = files.names_in(self._tmp)
        if leftovers or not files.names_in(self._logs):
            os.sync()  # which name it was is not known, and to sync each directory takes milliseconds
        for leftover in leftovers:
            files.remove(self._tmp / leftover)
        for shard in (self._blobs / name for name in files.names_in(self._blobs)):
            for blob in files.names_in(shard) if files.is_dir(shard) else ():
                if _BLOB_NAME.fullmatch(blob):
                    self._blob_sizes[f"sha256:{blob}"] = os.lstat(shard / blob).st_size

    def _read_log(self, directory: Path) -> dict[int, bytes]:
        records = {}
        for name in files.names_in(directory):
            if _RECORD_NAME.fullmatch(name):
                payload = b""
                with contextlib.suppress(OSError):
                    payload = bytes(files.read_file(directory / name))
                records[int(name.partition(".")[0])] = payload
        return records


class FileBlobReader:
    """A blob as an open file: read with `pread`, never mapped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._num_bytes = os.fstat(fd).st_size

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self._num_bytes

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes from `start`. Raises `PrefixUnavailable`."""
        try:
            return os.pread(self._fd, num_bytes, start)
        except OSError as error:
            raise PrefixUnavailable("the artifact can not be read from the store") from error

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            files.close_quietly(self._fd)
            self._fd = -1


class FileStagedBlob:
    """A staging: a file in tmp/ that stays open, so that what is judged is what is published."""

    def __init__(self, backend: FilesystemBackend, path: Path, fd: int) -> None:
        self._backend = backend
        self._path = path
        self._fd = fd
        self._sha = hashlib.sha256()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._num_bytes

    @property
    def digest(self) -> str:
        """Digest of the bytes written so far."""
        return f"sha256:{self._sha.hexdigest()}"

    def write(self, chunk: bytes) -> None:
        """Append. Raises `StoreFull` or `StoreFailed`."""
        with files.translated_errors():
            files.write_all(self._fd, chunk)
        self._sha.update(chunk)
        self._num_bytes += len(chunk)

    def read(self, max_bytes: int | None = None) -> bytearray:
        """The first `max_bytes` (or all), read back from the file."""
        wanted = self._num_bytes if max_bytes is None else min(max_bytes, self._num_bytes)
        with files.translated_errors():
            return files.read_fd(self._fd, wanted)

    def publish(self) -> None:
        """Make the blob durable under its digest. Raises `StoreFull` or `StoreFailed`."""
        with files.translated_errors():
            # A second fsync after a failed one would lie: the staging is lost then.
            os.fsync(self._fd)
            self._backend.publish_file(self._path, self.digest, self._num_bytes)

    def discard(self) -> None:
        """Close and remove the file."""
        if self._fd >= 0:
            files.close_quietly(self._fd)
            files.remove(self._path)
            self._fd = -1


def _lock(path: Path) -> int:
    """Take the store's lock for this process; the kernel gives it back however the process ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise StoreLocked(
            "another process has this prefix store open; ask that server, stop it, or use another store (--store)"
        ) from error
    return fd
