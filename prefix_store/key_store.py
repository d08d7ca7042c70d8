"""Where API keys are kept: a directory of records, beside the prefixes, written once each and never changed.

    keys/lock                   held by flock while a process adds a record
    keys/<%020d>.json           records, numbered from 1 (`key_records`)
    keys/new                    a record that is being written; of a process that died, until the next one

Unlike the store, several processes may have it open: `prefixd keys` writes beside a running server, which finds the new
records when it next looks. To look is to ask whether the file of the next number exists, one call that the kernel answers
from memory, so the event loop may do it. Writers block, on the lock and the disk; threads take turns.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from prefix_store import key_records, records
from prefix_store.backends import durable_files as files
from prefix_store.errors import KeyNotIssued, KeysDamaged, PrefixStoreError, UnknownKey
from prefix_store.key_records import CreateKeyRecord, KeyRecord, RevokeKeyRecord, RotateKeyRecord
from prefix_store.keys import Key, KeyScope, KeyState, NewKey, check_issue, hash_of, new_text

logger = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 0.5
"""How long what another process did to the keys may go unnoticed."""
DEFAULT_OVERLAP_SECONDS: Final = 86_400.0
MAX_SECONDS: Final = 100 * 366 * 86_400
_RECORD_NAME: Final = re.compile(r"[0-9]{20}\.json")


class KeyStore:
    """The keys in one directory. Invariant: what is in memory is the fold of records 1 to `_num_records`.

    Records that can not be trusted make every key useless, until the directory is restored and the server started anew:
    the lost one may be a revocation.
    """

    def __init__(self, directory: Path) -> None:
        """Open or make the directory. Raises `KeysDamaged`, `StoreFailed`, `StoreFull`."""
        self._directory = directory
        self._lock = threading.Lock()  # guards all that follows; readers take one value of `_keys`
        self._keys: Mapping[str, Key] = {}  # replaced, never changed
        self._num_records = 0
        self._last_hash = records.GENESIS
        self._looked_at = time.monotonic()
        self._damaged = False
        with files.translated_errors():
            files.make_dirs(directory)
            self._recover()

    @staticmethod
    def has_keys(directory: Path) -> bool:
        """Whether a key was ever made there; makes nothing, and asks nothing more."""
        return files.exists(directory / f"{1:020d}.json")

    @property
    def any_made(self) -> bool:
        """Whether there ever was a key, also one that ended since, or one in a record that can not be read."""
        return self._damaged or self._num_records > 0

    def find(self, key_id: str) -> Key | None:
        """A key by its id; None if there is none, or none can be trusted."""
        return None if self._damaged else self._keys.get(key_id)

    def listed(self, tenant: str | None = None) -> list[Key]:
        """All keys, or those of one tenant, in the order in which they were made."""
        return [key for key in self._keys.values() if tenant is None or key.tenant == tenant]

    def refresh(self) -> None:
        """Take in what other processes did, at most every `REFRESH_SECONDS`. Never raises; does not block.

        A file system that fails leaves the keys as they were: who was let in stays let in.
        """
        if self._damaged or time.monotonic() - self._looked_at < REFRESH_SECONDS:
            return
        if not self._lock.acquire(blocking=False):
            return  # a thread of ours is writing, and reads them all before it does
        try:
            self._looked_at = time.monotonic()
            with files.translated_errors():
                self._catch_up()
        except PrefixStoreError as error:
            logger.error("API keys: %s", error)
        finally:
            self._lock.release()

    # ---- changes; all block --------------------------------------------------------------------

    def create(
        self,
        tenant: str,
        scopes: frozenset[KeyScope],
        *,
        expires_in_seconds: float | None = None,
        note: str = "",
    ) -> NewKey:
        """Make a key; durable on return. Raises `InvalidTenantName`, `KeyNotIssued`, `StoreFull`, `StoreFailed`."""
        check_issue(tenant, scopes, note)
        until = None if expires_in_seconds is None else _seconds(expires_in_seconds)
        with self._writing():
            key_id, text = self._unused_text()
            now = _now()
            record = CreateKeyRecord(
                **self._frame(key_id, now),
                sha256=hash_of(text),
                tenant=tenant,
                scopes=tuple(sorted(scopes)),
                expires_at=None if until is None else now + until,
                note=note,
            )
            self._append(record)
            return NewKey(self._keys[key_id], text)

    def rotate(self, key_id: str, *, overlap_seconds: float) -> NewKey:
        """Make the successor of a key, which ends after the overlap; durable on return.

        The successor has the same rights, and as long a life as the old key had when it was made. Raises `UnknownKey`,
        `KeyNotIssued` for a key that has ended or has a successor, `StoreFull`, `StoreFailed`.
        """
        overlap = _seconds(overlap_seconds, allow_zero=True)
        with self._writing():
            old, now = self._known(key_id), _now()
            if old.replaced_by is not None:
                raise KeyNotIssued(f"key {key_id} was rotated already, to {old.replaced_by}")
            if old.state(now) is not KeyState.ACTIVE:
                raise KeyNotIssued(f"key {key_id} is {old.state(now)}; make a new one")
            life = None if old.expires_at is None else old.expires_at - old.created_at
            ends = now + overlap
            new_id, text = self._unused_text()
            record = RotateKeyRecord(
                **self._frame(new_id, now),
                sha256=hash_of(text),
                expires_at=None if life is None else now + life,
                old_id=key_id,
                old_expires_at=ends if old.expires_at is None else min(ends, old.expires_at),
            )
            self._append(record)
            return NewKey(self._keys[new_id], text)

    def revoke(self, key_id: str) -> Key:
        """End a key at once; durable on return. One that is revoked stays so. Raises `UnknownKey`, `StoreFull`, `StoreFailed`."""
        with self._writing():
            if self._known(key_id).revoked_at is None:
                self._append(RevokeKeyRecord(**self._frame(key_id, _now())))
            return self._keys[key_id]

    def _known(self, key_id: str) -> Key:
        key = self._keys.get(key_id)
        if key is None:
            raise UnknownKey(f"there is no key {key_id[:80]!r}")
        return key

    def _unused_text(self) -> tuple[str, str]:
        key_id, text = new_text()
        while key_id in self._keys:
            key_id, text = new_text()
        return key_id, text

    def _frame(self, key_id: str, now: datetime) -> dict[str, Any]:
        return {
            "index": self._num_records + 1,
            "prev": self._last_hash,
            "created_at": now,
            "key_id": key_id,
        }

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone among threads and processes, and knowing all that is there."""
        with self._lock, files.translated_errors(), _locked(self._directory / "lock"):
            self._catch_up()
            if self._damaged:
                raise KeysDamaged("the records of API keys are damaged; restore them")
            yield

    def _append(self, record: KeyRecord) -> None:
        """Durable first, valid second. Called by writers."""
        payload = key_records.dump(record)
        source = self._directory / "new"
        files.remove(source)  # of a process that died
        fd = files.create(source)
        try:
            files.write_all(fd, payload)
            os.fsync(fd)
            files.link_new(source, self._path(record.index))
        finally:
            files.close_quietly(fd)
            files.remove(source)
        self._take(record, payload)

    # ---- reading; with the lock held, but for the first time -----------------------------------

    def _recover(self) -> None:
        """Read all; make names last that a killed process may have left unsynced, before anyone relies on them."""
        names = [n for n in files.names_in(self._directory) if _RECORD_NAME.fullmatch(n)]
        if names:
            files.sync_dir(self._directory)
        else:
            os.sync()  # of which directories above it was killed while it made them, is not known
        self._catch_up()
        if len(names) > self._num_records:
            raise KeysDamaged(f"the records of API keys lack number {self._num_records + 1}")

    def _catch_up(self) -> None:
        while files.exists(self._path(self._num_records + 1)):
            payload = bytes(files.read_file(self._path(self._num_records + 1)))
            try:
                self._take(key_records.load(payload), payload)
            except ValueError:
                self._damaged = True
                raise KeysDamaged(
                    f"record {self._num_records + 1} of the API keys is damaged; no key made here opens anything"
                ) from None

    def _take(self, record: KeyRecord, payload: bytes) -> None:
        """Raises `ValueError` for a record that does not follow those before it."""
        if record.index != self._num_records + 1 or record.prev != self._last_hash:
            raise ValueError("the record does not continue the chain")
        changed = {key.id: key for key in key_records.changed_keys(self._keys, record)}
        self._keys = {**self._keys, **changed}
        self._num_records += 1
        self._last_hash = records.chain_hash(payload)

    def _path(self, index: int) -> Path:
        return self._directory / f"{index:020d}.json"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by this process alone; the kernel gives it back however the process ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _now() -> datetime:
    """Wall clock: keys end at times that people state. Of the precision in which it is stored."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def _seconds(value: float, *, allow_zero: bool = False) -> timedelta:
    if not (0 < value <= MAX_SECONDS or (allow_zero and value == 0)):
        raise KeyNotIssued(
            f"expected {'0' if allow_zero else 'more than 0'} to {MAX_SECONDS} seconds"
        )
    return timedelta(seconds=value)
