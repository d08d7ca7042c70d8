"""API keys as values: what a key may do, how its text is made, and when it ends.

A key is `pfx_<id>_<secret>`. Its id is shown everywhere; the whole text is shown once, to whoever has the key made,
and only its SHA-256 is kept: the secret is 256 random bits, which no slow hash would make harder to guess. Pure, any
thread; called by `key_records`, `key_store` and `server.http.auth`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from prefix_store.errors import KeyNotIssued
from prefix_store.spec import OPERATOR, check_tenant_name

_ID_BYTES: Final = 4
_SECRET_BYTES: Final = 32
_KEY: Final = re.compile(r"pfx_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
MAX_NOTE: Final = 200


class KeyScope(StrEnum):
    """What a key may do with the tasks of its tenant. METRICS tell of all tenants, so only an operator's key has it."""

    INFER = "infer"
    ADMIN = "admin"
    METRICS = "metrics"


class KeyState(StrEnum):
    """Only ACTIVE keys open anything."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret. `tenant` is `OPERATOR` for the keys of whoever runs the server.

    `replaced_by`: the id of the key that it was rotated to.
    """

    id: str
    sha256: str
    tenant: str
    scopes: frozenset[KeyScope]
    created_at: datetime
    expires_at: datetime | None = None
    note: str = ""
    revoked_at: datetime | None = None
    replaced_by: str | None = None

    def state(self, now: datetime) -> KeyState:
        """What the key is worth at `now`."""
        if self.revoked_at is not None:
            return KeyState.REVOKED
        if self.expires_at is not None and now >= self.expires_at:
            return KeyState.EXPIRED
        return KeyState.ACTIVE


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made, with its text, which nobody can show again."""

    key: Key
    text: str

    def __repr__(self) -> str:
        return f"NewKey({self.key.id})"


def new_text() -> tuple[str, str]:
    """The id and the text of a new key."""
    key_id = secrets.token_hex(_ID_BYTES)
    return key_id, f"pfx_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"


def id_in(text: str) -> str | None:
    """The id in a key's text; None if this is not the text of a key of ours."""
    match = _KEY.fullmatch(text)
    return match[1] if match else None


def hash_of(text: str) -> str:
    """The SHA-256 of a key's text, as it is kept."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_key(text_sha256: str, key_sha256: str) -> bool:
    """Whether two hashes are the same, in a time that does not depend on where they differ."""
    return hmac.compare_digest(text_sha256, key_sha256)


def described_key(key: Key) -> dict[str, Any]:
    """A key for people and programmes; nothing in it opens anything."""
    return {
        "id": key.id,
        "tenant": key.tenant or None,
        "scopes": sorted(key.scopes),
        "state": key.state(datetime.now(UTC)),
        "created_at": key.created_at.isoformat(timespec="milliseconds"),
        "expires_at": key.expires_at and key.expires_at.isoformat(timespec="milliseconds"),
        "revoked_at": key.revoked_at and key.revoked_at.isoformat(timespec="milliseconds"),
        "replaced_by": key.replaced_by,
        "note": key.note,
    }


def check_issue(tenant: str, scopes: frozenset[KeyScope], note: str) -> None:
    """Raises `InvalidTenantName` or `KeyNotIssued` for a key that may not be made."""
    if tenant != OPERATOR:
        check_tenant_name(tenant)
    if not scopes:
        raise KeyNotIssued("scopes: expected one or more of infer, admin, metrics")
    if tenant != OPERATOR and KeyScope.METRICS in scopes:
        raise KeyNotIssued(
            "scopes: metrics tell of all tenants, so only a key without a tenant has this scope"
        )
    if len(note) > MAX_NOTE or not all(" " <= char <= "~" for char in note):
        raise KeyNotIssued(f"note: expected up to {MAX_NOTE} printable ASCII characters")
