"""Which status, type and code each exception means: one table, and the exceptions of HTTP itself.

Domain code raises; `server.http.error_responses` looks here and writes the answer. A class that is not in
the table has the entry of its nearest ancestor that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prefix_store import errors as store
from server import errors as ours


class MalformedBody(ours.RequestError):
    """The body is not JSON, or not an object."""


class UnsupportedMediaType(ours.RequestError):
    """The body is in a format or encoding that the route does not read."""


class BodyTooLarge(ours.RequestError):
    """More bytes than the route takes."""


class BodyTooSlow(ours.RequestError):
    """The body did not arrive in time."""


class NotAuthenticated(ours.PrefixdError):
    """No key, or the wrong one."""


class NotPermitted(ours.PrefixdError):
    """The key is right, and opens other routes than this."""


class KeyInUrl(ours.RequestError):
    """A key was sent in the path or the query, where it is kept by whatever sees URLs."""


class NoSuchRoute(ours.PrefixdError):
    """Nothing is served at this path."""


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How an exception is told to a client. `retry_after`: seconds, for those worth repeating.

    `closes`: the connection ends with the answer. The rest of the body may still be on its way, and would be
    read and thrown away for as long as the client likes to send.
    """

    status: int
    type: str
    code: str
    retry_after: int | None = None
    closes: bool = False


_CALLER: Final = "invalid_request_error"
_SERVER: Final = "server_error"
INTERNAL: Final = ErrorKind(500, _SERVER, "internal_error")

ERROR_KINDS: Final[dict[type[Exception], ErrorKind]] = {
    ours.PrefixdError: INTERNAL,
    ours.ConfigError: INTERNAL,
    ours.ModelRefused: INTERNAL,
    ours.CapacityError: INTERNAL,
    ours.RequestError: ErrorKind(400, _CALLER, "invalid_request"),
    ours.InvalidParameter: ErrorKind(400, _CALLER, "invalid_parameter"),
    ours.ContextTooLong: ErrorKind(400, _CALLER, "context_length_exceeded"),
    ours.ModelNotFound: ErrorKind(404, _CALLER, "model_not_found"),
    ours.PinRefused: ErrorKind(409, _CALLER, "pin_refused"),
    ours.EngineOverloaded: ErrorKind(503, _SERVER, "overloaded", retry_after=1),
    ours.DeadlineExceeded: ErrorKind(504, "timeout_error", "deadline_exceeded"),
    ours.EngineStopped: ErrorKind(503, _SERVER, "not_ready", retry_after=5),
    ours.GenerationFailed: ErrorKind(500, _SERVER, "generation_failed"),
    MalformedBody: ErrorKind(400, _CALLER, "invalid_json"),
    UnsupportedMediaType: ErrorKind(415, _CALLER, "unsupported_media_type"),
    BodyTooLarge: ErrorKind(413, _CALLER, "body_too_large", closes=True),
    BodyTooSlow: ErrorKind(408, _CALLER, "body_too_slow", closes=True),
    NotAuthenticated: ErrorKind(401, "authentication_error", "invalid_api_key"),
    NotPermitted: ErrorKind(403, "permission_error", "insufficient_scope"),
    KeyInUrl: ErrorKind(400, _CALLER, "key_in_url"),
    NoSuchRoute: ErrorKind(404, _CALLER, "no_such_route"),
    store.PrefixStoreError: INTERNAL,
    store.PrefixRejected: ErrorKind(422, _CALLER, "prefix_rejected"),
    store.MalformedArtifact: ErrorKind(400, _CALLER, "malformed_artifact"),
    store.IncompatiblePrefix: ErrorKind(422, _CALLER, "incompatible_prefix"),
    store.ImportRefused: ErrorKind(422, _CALLER, "import_refused"),
    store.AmbiguousFormat: ErrorKind(422, _CALLER, "ambiguous_format"),
    store.ProofFailed: ErrorKind(422, _CALLER, "proof_failed"),
    store.RebaseRefused: ErrorKind(422, _CALLER, "rebase_refused"),
    store.DigestMismatch: ErrorKind(400, _CALLER, "digest_mismatch"),
    store.ArtifactTooLarge: ErrorKind(413, _CALLER, "artifact_too_large", closes=True),
    store.InvalidTaskName: ErrorKind(400, _CALLER, "invalid_task_name"),
    store.InvalidTenantName: ErrorKind(400, _CALLER, "invalid_tenant_name"),
    store.UnknownTask: ErrorKind(404, _CALLER, "unknown_task"),
    store.UnknownVersion: ErrorKind(404, _CALLER, "unknown_version"),
    store.NoSuchMove: ErrorKind(409, _CALLER, "no_such_move"),
    store.UnknownKey: ErrorKind(404, _CALLER, "unknown_key"),
    store.KeyNotIssued: ErrorKind(400, _CALLER, "key_not_issued"),
    store.AuditDamaged: INTERNAL,
    store.KeysDamaged: ErrorKind(500, _SERVER, "keys_damaged"),
    store.PreconditionFailed: ErrorKind(412, _CALLER, "precondition_failed"),
    store.PrefixUnavailable: ErrorKind(503, _SERVER, "prefix_unavailable", retry_after=5),
    store.StoreFull: ErrorKind(507, _SERVER, "store_full", closes=True),
    store.StoreFailed: ErrorKind(500, _SERVER, "store_failed"),
    store.StoreLocked: INTERNAL,
}


def kind_of(error: Exception) -> ErrorKind:
    """The entry of the error's class, or of its nearest ancestor; `INTERNAL` for foreign exceptions."""
    for cls in type(error).__mro__:
        if issubclass(cls, Exception) and cls in ERROR_KINDS:
            return ERROR_KINDS[cls]
    return INTERNAL


def message_of(error: Exception, request_id: str) -> str:
    """What the client reads. Only our own exceptions speak for themselves; none that mean our fault do."""
    if kind_of(error) is INTERNAL:
        return f"internal error; the server's log has more under request id {request_id}"
    return str(error)
