"""What can go wrong in the server, as named exceptions.

    PrefixdError
     |-- ConfigError                 a setting, a flag or a combination of them can not work
     |-- ModelRefused                the base model can not be served; says which trait of it
     |-- CapacityError               start-up: memory is short, or not even one request fits; names the setting
     |-- RequestError                the caller's fault; `param` names the field
     |    |-- InvalidParameter
     |    |-- ContextTooLong         prefix + prompt + max_tokens exceed what the model or pool can hold
     |    `-- ModelNotFound          no such task (or version of it); `param` is model or task
     |-- PinRefused                  pinned prefixes would hold more of the pool than their budget
     |-- EngineOverloaded            the queue is full; try again later
     |-- DeadlineExceeded            its time was over before its first token
     |-- EngineStopped               the engine is shutting down or has died
     `-- GenerationFailed            this request failed while it ran; others did not

`prefix_store.errors` holds the store's own tree. `server.http.errors` gives each a status and a body.
"""

from __future__ import annotations


class PrefixdError(Exception):
    """Root of everything the server raises on purpose."""


class ConfigError(PrefixdError):
    """The configuration can not work; the message names the setting."""


class ModelRefused(PrefixdError):
    """The base model has a trait that the engine can not serve exactly."""


class CapacityError(PrefixdError):
    """At start: memory is short, or the KV pool can not hold a single request."""


class RequestError(PrefixdError):
    """A request that can not be served as it stands; `param` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidParameter(RequestError):
    """A field has a value that it may not have."""


class ContextTooLong(RequestError):
    """Prefix, prompt and max_tokens together exceed the model's positions or the KV pool."""


class ModelNotFound(RequestError):
    """The named task or version does not exist."""


class PinRefused(PrefixdError):
    """The pin budget does not allow it; the message has the figures and names the setting."""


class EngineOverloaded(PrefixdError):
    """Too many requests are waiting."""


class DeadlineExceeded(PrefixdError):
    """The time that a request may take was over before it had a token to show."""


class EngineStopped(PrefixdError):
    """The engine takes no more requests."""


class GenerationFailed(PrefixdError):
    """One request failed while it ran (a bad row, a prefix that could not be loaded)."""
