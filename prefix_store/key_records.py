"""The records of API keys, and what they add up to.

As in a task's version log (`records`): one JSON object each, numbered from 1, with the SHA-256 of the one before
and a seal over itself; a `kind` never changes its meaning. Pure, any thread; called by `key_store`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

from prefix_store.keys import Key, KeyScope
from prefix_store.records import sealed, unsealed

_KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    index: int = Field(ge=1)
    prev: _Sha256
    created_at: AwareDatetime
    key_id: _KeyId


class CreateKeyRecord(_Record):
    """From here on, there is the key `key_id`."""

    kind: Literal["create"] = "create"
    sha256: _Sha256
    tenant: str
    scopes: tuple[KeyScope, ...]
    expires_at: AwareDatetime | None
    note: str


class RotateKeyRecord(_Record):
    """From here on, `key_id` stands beside the key `old_id`, which has the same rights and ends at `old_expires_at`."""

    kind: Literal["rotate"] = "rotate"
    sha256: _Sha256
    expires_at: AwareDatetime | None
    old_id: _KeyId
    old_expires_at: AwareDatetime


class RevokeKeyRecord(_Record):
    """From here on, the key `key_id` opens nothing."""

    kind: Literal["revoke"] = "revoke"


KeyRecord = CreateKeyRecord | RotateKeyRecord | RevokeKeyRecord
_ADAPTER: Final[TypeAdapter[KeyRecord]] = TypeAdapter(
    Annotated[KeyRecord, Field(discriminator="kind")]
)


def dump(record: KeyRecord) -> bytes:
    """The bytes to store."""
    return sealed(_ADAPTER.dump_json(record))


def load(payload: bytes) -> KeyRecord:
    """The record in `payload`. Raises `ValueError` when it is not one, or not what its seal says."""
    text = unsealed(payload)
    if text == payload:
        raise ValueError("a record of keys has a seal")
    return _ADAPTER.validate_json(text)


def changed_keys(keys: Mapping[str, Key], record: KeyRecord) -> list[Key]:
    """The keys that are new or other after `record`. Raises `ValueError` if it does not fit to `keys`."""
    at = record.created_at
    match record:
        case CreateKeyRecord(key_id=key_id):
            _require(key_id not in keys)
            scopes = frozenset(record.scopes)
            new = Key(
                key_id, record.sha256, record.tenant, scopes, at, record.expires_at, record.note
            )
            return [new]
        case RotateKeyRecord(key_id=key_id, old_id=old_id):
            _require(key_id not in keys and old_id in keys)
            old = keys[old_id]
            new = replace(
                old,
                id=key_id,
                sha256=record.sha256,
                created_at=at,
                expires_at=record.expires_at,
                revoked_at=None,
                replaced_by=None,
            )
            return [replace(old, expires_at=record.old_expires_at, replaced_by=key_id), new]
        case RevokeKeyRecord(key_id=key_id):
            _require(key_id in keys)
            return [replace(keys[key_id], revoked_at=at)]


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError("the record does not fit to those before it")
