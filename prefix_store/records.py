"""The records of a task's version log, and the chain that ties them together.

A record is one JSON object. It names its place (`index`, from 1), the task, and the SHA-256 of the record
before it (`prev`), so a record that was changed, lost, swapped or moved to another task is noticed. It ends with
a SHA-256 over itself, the seal, because nothing names the hash of the last one, and there a flipped bit could move
`live`. Records from before seals have none and are read as they are. A `kind` never changes its meaning or its fields: what is new gets a new kind, so old logs stay readable for ever, and
a program that does not know a kind finds the log damaged instead of reading it wrongly. Functions on any thread; called by `catalog`, and for their seals
by `key_records`.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from prefix_store.spec import PrefixManifest

GENESIS: Final = "0" * 64
"""`prev` of a log's first record."""

_SEAL: Final = re.compile(rb',"sha256":"([0-9a-f]{64})"\}')
_SEAL_BYTES: Final = len(b',"sha256":""}') + 64


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    index: int = Field(ge=1)
    prev: str = Field(pattern=r"^[0-9a-f]{64}$")
    task: str
    created_at: str


class PublishRecord(_Record):
    """From here on, `version` is live."""

    kind: Literal["publish"] = "publish"
    version: int = Field(ge=1)
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    size_bytes: int = Field(ge=1)
    manifest: PrefixManifest


class StoreRecord(_Record):
    """From here on, `version` can be named; no alias moves."""

    kind: Literal["store"] = "store"
    version: int = Field(ge=1)
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    size_bytes: int = Field(ge=1)
    manifest: PrefixManifest


class PromoteRecord(_Record):
    """From here on, `version`, which exists, is live."""

    kind: Literal["promote"] = "promote"
    version: int = Field(ge=1)


class RollbackRecord(_Record):
    """From here on, `version`, which was live before the present one, is live again."""

    kind: Literal["rollback"] = "rollback"
    version: int = Field(ge=1)


class CanaryRecord(_Record):
    """From here on, `version` is the canary, and takes `weight` of the bare name's requests."""

    kind: Literal["canary"] = "canary"
    version: int = Field(ge=1)
    weight: float = Field(ge=0, le=1, allow_inf_nan=False)


class EndCanaryRecord(_Record):
    """From here on, there is no canary."""

    kind: Literal["end_canary"] = "end_canary"


class GrantRecord(_Record):
    """From here on, `tenant` may use the task, which belongs to another."""

    kind: Literal["grant"] = "grant"
    tenant: str = Field(min_length=1)


class EndGrantRecord(_Record):
    """From here on, `tenant` may not use the task any more."""

    kind: Literal["end_grant"] = "end_grant"
    tenant: str = Field(min_length=1)


class DeleteRecord(_Record):
    """From here on, the task is gone, with all versions and grants so far."""

    kind: Literal["delete"] = "delete"


Record = (
    PublishRecord
    | StoreRecord
    | PromoteRecord
    | RollbackRecord
    | CanaryRecord
    | EndCanaryRecord
    | GrantRecord
    | EndGrantRecord
    | DeleteRecord
)
_ADAPTER: Final[TypeAdapter[Record]] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def dump(record: Record) -> bytes:
    """The bytes to store."""
    return sealed(_ADAPTER.dump_json(record))


def sealed(text: bytes) -> bytes:
    """A JSON object with the hash of its text as one more field, the last."""
    return text[:-1] + b',"sha256":"' + chain_hash(text).encode() + b'"}'


def load(payload: bytes) -> Record:
    """The record in `payload`. Raises `ValueError` when it is not one, or not what its seal says."""
    return _ADAPTER.validate_json(unsealed(payload))


def unsealed(payload: bytes) -> bytes:
    """The JSON object without its seal, if it has one. Raises `ValueError` when it is not what that says."""
    seal = _SEAL.fullmatch(payload[-_SEAL_BYTES:])
    if seal is None:  # no kind has such a field, so a damaged seal is refused as an unknown one
        return payload
    text = payload[:-_SEAL_BYTES] + b"}"
    if chain_hash(text) != seal[1].decode():
        raise ValueError("the record is not what its seal says")
    return text


def chain_hash(payload: bytes) -> str:
    """What the next record's `prev` must be."""
    return hashlib.sha256(payload).hexdigest()


def now() -> str:
    """When a record is made: wall clock, for people only; order is the record's index."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def log_name(task: str) -> str:
    """The name of a task's log. Task names never become paths, so none can be crafted."""
    return hashlib.sha256(task.encode()).hexdigest()[:32]
