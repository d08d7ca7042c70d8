"""Who asks: the tenant and the rights behind a request's key. Made by `auth`, kept in the ASGI scope by `gate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.types import Scope

from prefix_store.keys import KeyScope
from prefix_store.spec import OPERATOR

_PLACE: Final = "prefixd.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` is `OPERATOR` for the keys of whoever runs the server. `key_id`: for logs; empty without a key."""

    key_id: str
    tenant: str
    scopes: frozenset[KeyScope]

    @property
    def is_operator(self) -> bool:
        """Whether this is the operator's hand, which sees and changes the tasks of every tenant.

        An operator's key for inference alone is none: it goes to clients, and has the operator's own tasks only.
        """
        return self.tenant == OPERATOR and KeyScope.ADMIN in self.scopes


NOBODY: Final = Caller("", "~", frozenset())
"""Of the public routes: it may do nothing, and sees no task, for no tenant can have this name."""


def put_caller(scope: Scope, caller: Caller) -> None:
    """Remember who asks; only `gate` does."""
    scope[_PLACE] = caller


def caller_of(request: Request) -> Caller:
    """Who asks. There is no request without one."""
    caller = request.scope[_PLACE]
    assert isinstance(caller, Caller)
    return caller
